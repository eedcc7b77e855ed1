// Decode kernels for the CPU: linear layers and experts of a few tokens, attention of one query per sequence.
//
// Shapes: N tokens, D inputs, F outputs, E experts, A active experts per token; B batch, S keys, H heads, G kv heads,
// K head dim. Weights are packed (decode.py) in blocks of 32 outputs: (F / 32, steps, 32, inputs per step), padded with
// zeros, where a step holds one input (fp32), two (bf16) or four (int8). Each thread then reads one contiguous segment
// of memory. Activations are fp32 (for fp32 weights) or bf16 (for bf16 and int8 weights); sums are fp32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using bf16 = at::BFloat16;

constexpr int LANES = 16;          // fp32 values per vector
constexpr int BLOCK = 2 * LANES;   // outputs per block of a packed weight
constexpr int MAX_TOKENS = 8;      // tokens that share one read of a weight, and heads that share one read of a value

typedef float FloatVec __attribute__((vector_size(64)));
typedef uint32_t Bf16x2Vec __attribute__((vector_size(64)));  // 16 pairs of bf16, the first of each in the low half
typedef int32_t IntVec __attribute__((vector_size(64)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

template <class V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, FloatVec value) { std::memcpy(to, &value, sizeof value); }
inline FloatVec first_of_pair(Bf16x2Vec pairs) { return (FloatVec)(pairs << 16); }
inline FloatVec second_of_pair(Bf16x2Vec pairs) { return (FloatVec)(pairs & 0xffff0000u); }

// exp(x) = 2^n 2^f with |f| <= 1/2; 2^f by its Taylor series, relative error 1e-7. Clamped to exp(-87) .. exp(88).
inline FloatVec exp_approx(FloatVec x) {
  FloatVec lowest = FloatVec{} - 87, highest = FloatVec{} + 88, half = FloatVec{} + 0.5f;
  x = x < lowest ? lowest : x > highest ? highest : x;
  FloatVec z = x * 1.44269504f;
  FloatVec nearest = z < 0.f ? z - half : z + half;
  IntVec n = __builtin_convertvector(nearest == nearest ? nearest : FloatVec{}, IntVec);  // NaN has no integer
  FloatVec f = (z - __builtin_convertvector(n, FloatVec)) * 0.693147181f, sum = f / 720 + 1.f / 120;
  sum = sum * f + 1.f / 24;
  sum = sum * f + 1.f / 6;
  sum = sum * f + 0.5f;
  sum = sum * f + 1.f;
  sum = sum * f + 1.f;
  return (FloatVec)((IntVec)sum + (n << 23));
}

// ------------------------------------------------------------------- one step of 16 outputs

struct Int8x4 { Bf16x2Vec first, second; };  // four int8 weights per output, widened to two pairs of bf16

inline FloatVec load_weights(const float* from) { return load<FloatVec>(from); }
inline Bf16x2Vec load_weights(const bf16* from) { return load<Bf16x2Vec>(from); }
inline Bf16x2Vec to_bf16_pairs(IntVec first, IntVec second) {  // an 8-bit integer is exact in bf16
  auto a = (Bf16x2Vec)__builtin_convertvector(first, FloatVec);
  auto b = (Bf16x2Vec)__builtin_convertvector(second, FloatVec);
  return (a >> 16) | (b & 0xffff0000u);
}
inline Int8x4 load_weights(const int8_t* from) {
  auto packed = load<IntVec>(from);
  return {to_bf16_pairs(packed << 24 >> 24, packed << 16 >> 24), to_bf16_pairs(packed << 8 >> 24, packed >> 24)};
}

inline FloatVec multiply_add(FloatVec sum, FloatVec w, float x) { return sum + w * x; }
inline FloatVec multiply_add(FloatVec sum, Bf16x2Vec w, Bf16x2Vec x) {
#ifdef __AVX512BF16__
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
  return sum + first_of_pair(w) * first_of_pair(x) + second_of_pair(w) * second_of_pair(x);
#endif
}
inline FloatVec multiply_add(FloatVec sum, Bf16x2Vec w, uint32_t x) { return multiply_add(sum, w, Bf16x2Vec{} + x); }
inline FloatVec multiply_add(FloatVec sum, Int8x4 w, uint64_t x) {
  return multiply_add(multiply_add(sum, w.first, uint32_t(x)), w.second, uint32_t(x >> 32));
}

// The activations that go with weights of type T: their type, and the word that holds those of one step.
template <class T>
struct Input;
template <>
struct Input<float> { using Value = float; using Step = float; };
template <>
struct Input<bf16> { using Value = bf16; using Step = uint32_t; };
template <>
struct Input<int8_t> { using Value = bf16; using Step = uint64_t; };
template <class T>
constexpr int PER_STEP = sizeof(typename Input<T>::Step) / sizeof(typename Input<T>::Value);

// ------------------------------------------------------------------- matmul of one block

// One block for N tokens: w (steps, 32, ...), x[n] (steps,) -> out (N, 32). With one or two tokens each sum is split
// over several accumulators, to hide the latency of the additions.
template <int N, class T, class Step>
void block_matmul_of(const T* w, const Step* const* x, int64_t steps, float* out) {
  constexpr int ACCUMULATORS = N > 2 ? 1 : N > 1 ? 2 : 4, HALF = LANES * PER_STEP<T>;
  FloatVec sum[ACCUMULATORS][N][2] = {};
  auto add = [&](int accumulator, int64_t step) {
    auto first = load_weights(w + step * 2 * HALF), second = load_weights(w + step * 2 * HALF + HALF);
    for (int n = 0; n < N; n++) {
      sum[accumulator][n][0] = multiply_add(sum[accumulator][n][0], first, x[n][step]);
      sum[accumulator][n][1] = multiply_add(sum[accumulator][n][1], second, x[n][step]);
    }
  };
  int64_t step = 0;
  for (; step + ACCUMULATORS <= steps; step += ACCUMULATORS)
    for (int i = 0; i < ACCUMULATORS; i++) add(i, step + i);
  for (; step < steps; step++) add(0, step);
  for (int n = 0; n < N; n++)
    for (int half = 0; half < 2; half++) {
      for (int i = 1; i < ACCUMULATORS; i++) sum[0][n][half] += sum[i][n][half];
      store(out + n * BLOCK + half * LANES, sum[0][n][half]);
    }
}

// The same for any number of tokens, split evenly into groups of at most MAX_TOKENS: calls out(n, its 32 sums).
template <class T, class Step, class Out>
void block_matmul(const T* w, const std::vector<const Step*>& x, int64_t steps, Out out) {
  using Kernel = void (*)(const T*, const Step* const*, int64_t, float*);
  static constexpr Kernel KERNELS[] = {block_matmul_of<1, T, Step>, block_matmul_of<2, T, Step>,
                                       block_matmul_of<3, T, Step>, block_matmul_of<4, T, Step>,
                                       block_matmul_of<5, T, Step>, block_matmul_of<6, T, Step>,
                                       block_matmul_of<7, T, Step>, block_matmul_of<8, T, Step>};
  int64_t tokens = x.size(), groups = (tokens + MAX_TOKENS - 1) / MAX_TOKENS;
  float sums[MAX_TOKENS * BLOCK];
  for (int64_t group = 0; group < groups; group++) {
    int64_t first = tokens * group / groups, count = tokens * (group + 1) / groups - first;
    KERNELS[count - 1](w, x.data() + first, steps, sums);
    for (int64_t n = 0; n < count; n++) out(first + n, sums + n * BLOCK);
  }
}

// ------------------------------------------------------------------- checked access to tensors

// Calls run(pointer to the first element) with the type of the weights.
template <class Run>
void dispatch_by_type(const Tensor& weight, Run run) {
  if (weight.scalar_type() == at::kFloat) return run(weight.const_data_ptr<float>());
  if (weight.scalar_type() == at::kBFloat16) return run(weight.const_data_ptr<bf16>());
  TORCH_CHECK(weight.scalar_type() == at::kChar, "weights must be fp32, bf16 or int8, not ", weight.scalar_type());
  run(weight.const_data_ptr<int8_t>());
}

// weight: (F / 32, steps, 32, PER_STEP), or with a dimension of experts in front; contiguous, of type T.
template <class T>
void check_packed(const Tensor& weight, int64_t dim) {
  TORCH_CHECK(weight.scalar_type() == c10::CppTypeToScalarType<T>::value, "packed weights differ in type");
  TORCH_CHECK(weight.dim() == dim, "a packed weight must have ", dim, " dimensions, not ", weight.dim());
  TORCH_CHECK(weight.is_contiguous(), "a packed weight must be contiguous, not of strides ", weight.strides());
  TORCH_CHECK(weight.size(-2) == BLOCK && weight.size(-1) == PER_STEP<T>, "a packed weight of ", weight.scalar_type(),
              " must end in (", BLOCK, ", ", PER_STEP<T>, "), not in ", weight.sizes().slice(dim - 2));
}

// One fp32 scale per output of `weight`, padding included.
const float* scale_pointer(const Tensor& scale, const Tensor& weight) {
  int64_t outputs = BLOCK;
  for (int64_t i = 0; i < weight.dim() - 3; i++) outputs *= weight.size(i);
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.is_contiguous(), "scales must be contiguous fp32");
  TORCH_CHECK(scale.numel() == outputs, scale.numel(), " scales for a packed weight of ", outputs, " outputs");
  return scale.const_data_ptr<float>();
}

// Pointers to the N tokens of x (N, D), as weights of `steps` steps read them. They point into `buffer` where D is not
// a multiple of a step (padded with zeros) or x is not aligned to one.
template <class T>
auto token_pointers(const Tensor& x, int64_t steps, std::vector<typename Input<T>::Value>& buffer) {
  using Value = typename Input<T>::Value;
  using Step = typename Input<T>::Step;
  int64_t n = x.size(0), d = x.size(1), width = steps * PER_STEP<T>;
  TORCH_CHECK(x.scalar_type() == c10::CppTypeToScalarType<Value>::value, "activations of ", x.scalar_type(),
              " do not fit the weights");
  TORCH_CHECK(d <= width && d > width - PER_STEP<T>, "tokens of ", d, " values do not fit weights of about ", width,
              " inputs");
  const Value* from = x.const_data_ptr<Value>();
  if (width != d || reinterpret_cast<uintptr_t>(from) % sizeof(Step)) {
    buffer.assign(n * width, Value(0));
    for (int64_t i = 0; i < n; i++) std::copy(from + i * d, from + (i + 1) * d, buffer.data() + i * width);
    from = buffer.data();
  }
  std::vector<const Step*> tokens(n);
  for (int64_t i = 0; i < n; i++) tokens[i] = reinterpret_cast<const Step*>(from + i * width);
  return tokens;
}

// ------------------------------------------------------------------- linear

// x (..., D) times a packed weight (F, D), times scale (F,) if given -> (..., F)
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale, int64_t n_outputs) {
  TORCH_CHECK(input.dim() > 0, "activations must have a dimension of inputs");
  Tensor out;
  dispatch_by_type(weight, [&](auto* w) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
    using Value = typename Input<T>::Value;
    check_packed<T>(weight, 4);
    int64_t blocks = weight.size(0), steps = weight.size(1);
    TORCH_CHECK(n_outputs <= blocks * BLOCK && n_outputs > (blocks - 1) * BLOCK, n_outputs,
                " outputs do not fit a packed weight of ", blocks, " blocks of ", BLOCK);
    const float* scales = scale.has_value() && scale->defined() ? scale_pointer(*scale, weight) : nullptr;
    auto sizes = input.sizes().vec();
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < sizes.size(); i++) tokens *= sizes[i];
    Tensor x = input.contiguous().view({tokens, sizes.back()});
    sizes.back() = n_outputs;
    out = at::empty(sizes, input.options());
    std::vector<Value> buffer;
    auto pointers = token_pointers<T>(x, steps, buffer);
    Value* to = out.mutable_data_ptr<Value>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        int64_t first = b * BLOCK, count = std::min<int64_t>(BLOCK, n_outputs - first);
        block_matmul(w + first * steps * PER_STEP<T>, pointers, steps, [&](int64_t n, const float* sums) {
          Value* token = to + n * n_outputs + first;
          for (int64_t i = 0; i < count; i++) token[i] = scales ? sums[i] * scales[first + i] : sums[i];
        });
      }
    });
  });
  return out;
}

// ------------------------------------------------------------------- experts

// One call of `experts`: pair i = (token i / A, its active expert i % A).
template <class T>
struct Experts {
  using Value = typename Input<T>::Value;
  using Step = typename Input<T>::Step;

  const Tensor &gate, &up, &down;                  // (E, blocks, steps, 32, PER_STEP)
  const float* scales[3];                          // of gate, up and down, or null
  int64_t dim, active, pairs;
  std::vector<std::vector<int64_t>> pairs_of;      // by expert
  std::vector<int64_t> used;                       // the experts that have a token
  int64_t width;                                   // of the hidden activations, a multiple of 32
  std::vector<Value> hidden;                       // (pairs, width), silu(gate(x)) * up(x)
  std::vector<std::vector<const Step*>> inputs;    // by used expert: the tokens, read by gate and up
  std::vector<std::vector<const Step*>> hidden_inputs;  // by used expert: rows of `hidden`, read by down

  Experts(const Tensor& x, const Tensor& chosen, at::TensorList matrices, at::TensorList scale)
      : gate(matrices[0]), up(matrices[1]), down(matrices[2]), scales{}, dim(x.size(1)), active(chosen.size(1)),
        pairs(chosen.numel()) {
    for (const Tensor& matrix : matrices) check_packed<T>(matrix, 5);
    int64_t n_experts = gate.size(0);
    width = gate.size(1) * BLOCK;
    int64_t down_inputs = down.size(2) * PER_STEP<T>;
    TORCH_CHECK(up.sizes() == gate.sizes() && down.size(0) == n_experts, "experts: gate ", gate.sizes(), ", up ",
                up.sizes(), " and down ", down.sizes(), " do not fit together");
    TORCH_CHECK(down.size(1) == (dim + BLOCK - 1) / BLOCK, "experts: down has ", down.size(1), " blocks for ", dim,
                " outputs");
    TORCH_CHECK(down_inputs <= width && down_inputs > width - BLOCK, "experts: down reads ", down_inputs,
                " inputs of ", width, " hidden activations");
    for (size_t i = 0; i < scale.size(); i++) scales[i] = scale_pointer(scale[i], matrices[i]);
    pairs_of.resize(n_experts);
    const int64_t* experts = chosen.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < pairs; i++) {
      TORCH_CHECK_INDEX(0 <= experts[i] && experts[i] < n_experts, "expert ", experts[i], " of ", n_experts);
      pairs_of[experts[i]].push_back(i);
    }
    for (int64_t e = 0; e < n_experts; e++)
      if (!pairs_of[e].empty()) used.push_back(e);
    hidden.resize(pairs * width);
  }

  void point_at(const std::vector<const Step*>& tokens) {
    inputs.resize(used.size());
    hidden_inputs.resize(used.size());
    for (size_t u = 0; u < used.size(); u++)
      for (int64_t pair : pairs_of[used[u]]) {
        inputs[u].push_back(tokens[pair / active]);
        hidden_inputs[u].push_back(reinterpret_cast<const Step*>(hidden.data() + pair * width));
      }
  }

  static const T* block_of(const Tensor& matrix, int64_t b) {
    return matrix.const_data_ptr<T>() + b * matrix.size(2) * BLOCK * PER_STEP<T>;
  }

  // hidden = silu(gate(x)) * up(x) of one block of a used expert; `gates` is room for (pairs, 32).
  void gate_up_block(int64_t u, int64_t block, float* gates) {
    int64_t b = used[u] * gate.size(1) + block;
    auto scaled = [&](int which, float sum, int lane) {
      return scales[which] ? sum * scales[which][b * BLOCK + lane] : sum;
    };
    block_matmul(block_of(gate, b), inputs[u], gate.size(2), [&](int64_t n, const float* sums) {
      float* g = gates + n * BLOCK;
      for (int lane = 0; lane < BLOCK; lane++) g[lane] = scaled(0, sums[lane], lane);
      for (int lane = 0; lane < BLOCK; lane += LANES) {
        auto value = load<FloatVec>(g + lane);
        store(g + lane, value / (1.f + exp_approx(-value)));
      }
    });
    block_matmul(block_of(up, b), inputs[u], gate.size(2), [&](int64_t n, const float* sums) {
      Value* to = hidden.data() + pairs_of[used[u]][n] * width + block * BLOCK;
      for (int lane = 0; lane < BLOCK; lane++) to[lane] = gates[n * BLOCK + lane] * scaled(1, sums[lane], lane);
    });
  }

  // out (pairs, D): one block of down(hidden) of a used expert.
  void down_block(int64_t u, int64_t block, Value* out) {
    int64_t b = used[u] * down.size(1) + block, count = std::min<int64_t>(BLOCK, dim - block * BLOCK);
    const float* scale = scales[2];
    block_matmul(block_of(down, b), hidden_inputs[u], down.size(2), [&](int64_t n, const float* sums) {
      Value* to = out + pairs_of[used[u]][n] * dim + block * BLOCK;
      for (int64_t lane = 0; lane < count; lane++) to[lane] = scale ? sums[lane] * scale[b * BLOCK + lane] : sums[lane];
    });
  }

  void run(Value* out) {
    int64_t in_blocks = gate.size(1), out_blocks = down.size(1), n_used = used.size();
    at::parallel_for(0, n_used * in_blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> gates(pairs * BLOCK);
      for (int64_t i = begin; i < end; i++) gate_up_block(i / in_blocks, i % in_blocks, gates.data());
    });
    at::parallel_for(0, n_used * out_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) down_block(i / out_blocks, i % out_blocks, out);
    });
  }
};

// Each token through its chosen experts, down(silu(gate(x)) * up(x)): x (N, D), chosen (N, A) int64 -> (N, A, D).
// held: packed gate and up (E, F / 32, ...) and down (E, D / 32, ...), and behind them their scales or nothing. (One
// list: AOTInductor passes an empty one as None.)
Tensor experts(const Tensor& input, const Tensor& chosen_, at::TensorList held) {
  TORCH_CHECK(held.size() == 3 || held.size() == 6, "experts needs gate, up and down, with all their scales or none");
  at::TensorList matrices = held.slice(0, 3), scales = held.slice(3);
  TORCH_CHECK(input.dim() == 2 && chosen_.dim() == 2 && chosen_.size(0) == input.size(0), "experts: tokens ",
              input.sizes(), " do not fit chosen experts ", chosen_.sizes());
  TORCH_CHECK(chosen_.scalar_type() == at::kLong, "experts: chosen must be int64, not ", chosen_.scalar_type());
  Tensor x = input.contiguous(), chosen = chosen_.contiguous();
  Tensor out = at::empty({x.size(0), chosen.size(1), x.size(1)}, x.options());
  dispatch_by_type(matrices[0], [&](auto* first_weight) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(first_weight)>>;
    Experts<T> call(x, chosen, matrices, scales);
    std::vector<typename Input<T>::Value> buffer;
    call.point_at(token_pointers<T>(x, call.gate.size(2), buffer));
    call.run(out.mutable_data_ptr<typename Input<T>::Value>());
  });
  return out;
}

// x (N, D), each token times the matrix of its expert `chosen` (N,) in a packed stack (E, F, D), times the stack's scales
// (E, F) if given -> (N, F).
Tensor expert_linear(const Tensor& input, const Tensor& chosen, const Tensor& stack, const std::optional<Tensor>& scale,
                     int64_t n_outputs) {
  TORCH_CHECK(input.dim() == 2 && chosen.dim() == 1 && chosen.size(0) == input.size(0) &&
              chosen.scalar_type() == at::kLong, "expert_linear: ", chosen.sizes(), " experts of ", chosen.scalar_type(),
              " for tokens ", input.sizes());
  Tensor out = at::empty({input.size(0), n_outputs}, input.options());
  dispatch_by_type(stack, [&](auto* w) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
    using Value = typename Input<T>::Value;
    using Step = typename Input<T>::Step;
    check_packed<T>(stack, 5);
    int64_t n_experts = stack.size(0), blocks = stack.size(1), steps = stack.size(2);
    TORCH_CHECK(n_outputs <= blocks * BLOCK && n_outputs > (blocks - 1) * BLOCK, n_outputs,
                " outputs do not fit a packed weight of ", blocks, " blocks of ", BLOCK);
    const float* scales = scale.has_value() && scale->defined() ? scale_pointer(*scale, stack) : nullptr;
    Tensor x = input.contiguous(), experts = chosen.contiguous();
    std::vector<Value> buffer;
    auto pointers = token_pointers<T>(x, steps, buffer);
    std::vector<std::vector<int64_t>> tokens_of(n_experts);
    std::vector<std::vector<const Step*>> inputs(n_experts);
    std::vector<int64_t> used;
    for (int64_t n = 0; n < x.size(0); n++) {
      int64_t e = experts.const_data_ptr<int64_t>()[n];
      TORCH_CHECK_INDEX(0 <= e && e < n_experts, "expert ", e, " of ", n_experts);
      if (tokens_of[e].empty()) used.push_back(e);
      tokens_of[e].push_back(n);
      inputs[e].push_back(pointers[n]);
    }
    Value* to = out.mutable_data_ptr<Value>();
    at::parallel_for(0, used.size() * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int64_t e = used[i / blocks], first = i % blocks * BLOCK, count = std::min<int64_t>(BLOCK, n_outputs - first);
        int64_t row = e * blocks * BLOCK + first;  // of all outputs of the stack
        block_matmul(w + row * steps * PER_STEP<T>, inputs[e], steps, [&](int64_t n, const float* sums) {
          Value* token = to + tokens_of[e][n] * n_outputs + first;
          for (int64_t j = 0; j < count; j++) token[j] = scales ? sums[j] * scales[row + j] : sums[j];
        });
      }
    });
  });
  return out;
}

// ------------------------------------------------------------------- attention of one query per sequence

constexpr int TILE = 64;                 // keys that are scored before their values are read
constexpr float NO_SCORE = -1e30f;       // the maximum before any key
constexpr float MASKED_SCORE = -2e30f;   // of a masked key; below NO_SCORE, so that its weight becomes zero

inline FloatVec dot_add(FloatVec sum, const float* a, const float* b) {
  return sum + load<FloatVec>(a) * load<FloatVec>(b);
}
inline FloatVec dot_add(FloatVec sum, const bf16* a, const bf16* b) {
  return multiply_add(sum, load<Bf16x2Vec>(a), load<Bf16x2Vec>(b));
}

// One stage of a tree reduction: lane l gets a[l] + a[l ^ W], or where W is a bit of l, the same of b.
template <int W, int... L>
FloatVec reduce_lanes(FloatVec a, FloatVec b, std::integer_sequence<int, L...>) {
  return SHUFFLE(a, b, (L & W ? LANES + L : L)...) + SHUFFLE(a, b, ((L & W ? LANES : 0) + (L ^ W))...);
}
template <int W>
FloatVec reduce_lanes(FloatVec a, FloatVec b) {
  return reduce_lanes<W>(a, b, std::make_integer_sequence<int, LANES>());
}

// The dot products of q (K,) with 16 keys, one per lane.
template <class T>
FloatVec dots(const T* q, const T* const* keys, int64_t dim) {
  constexpr int64_t SIZE = sizeof(FloatVec) / sizeof(T);
  FloatVec sum[LANES] = {};
  int64_t i = 0;
  for (; i + SIZE <= dim; i += SIZE)
    for (int s = 0; s < LANES; s++) sum[s] = dot_add(sum[s], q + i, keys[s] + i);
  // Reduce across lanes: each stage merges two vectors into one with half as many partial sums per key.
  for (int s = 0; s < 8; s++) sum[s] = reduce_lanes<8>(sum[s], sum[s + 8]);
  for (int s = 0; s < 4; s++) sum[s] = reduce_lanes<4>(sum[s], sum[s + 4]);
  for (int s = 0; s < 2; s++) sum[s] = reduce_lanes<2>(sum[s], sum[s + 2]);
  FloatVec all = reduce_lanes<1>(sum[0], sum[1]);
  for (; i < dim; i++)
    for (int s = 0; s < LANES; s++) all[s] += float(q[i]) * float(keys[s][i]);
  return all;
}

// Online softmax of one head over the keys so far: the maximum score, the sum of exp(score - max_score), and the
// values weighted by it.
struct OnlineSoftmax {
  float max_score;
  FloatVec total;  // the sum of its lanes
  float* values;
};

// values[h] += p[h][s] * v[s] over the keys of a tile; p is zero beyond the last key.
template <int H>
void accumulate_values(const float (*p)[TILE], const float* v, int64_t stride, int64_t n_keys, int64_t width,
                       OnlineSoftmax* heads) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) {
    FloatVec sum[H];
    for (int h = 0; h < H; h++) sum[h] = load<FloatVec>(heads[h].values + d);
    for (int64_t s = 0; s < n_keys; s++) {
      auto value = load<FloatVec>(v + s * stride + d);
      for (int h = 0; h < H; h++) sum[h] += value * p[h][s];
    }
    for (int h = 0; h < H; h++) store(heads[h].values + d, sum[h]);
  }
  for (; d < width; d++)
    for (int h = 0; h < H; h++)
      for (int64_t s = 0; s < n_keys; s++) heads[h].values[d] += p[h][s] * v[s * stride + d];
}

inline FloatVec even_lanes(FloatVec a, FloatVec b) {
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline FloatVec odd_lanes(FloatVec a, FloatVec b) {
  return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
inline FloatVec interleave_low(FloatVec a, FloatVec b) {
  return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline FloatVec interleave_high(FloatVec a, FloatVec b) {
  return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
// Rounds to bf16, left in the high half of each lane.
inline Bf16x2Vec round_to_bf16(FloatVec x) { return (Bf16x2Vec)x + 0x7fffu + (((Bf16x2Vec)x >> 16) & 1u); }

// In bf16 two keys are multiplied at once: their probabilities lie side by side, and so do their values.
template <int H>
void accumulate_values(const float (*p)[TILE], const bf16* v, int64_t stride, int64_t n_keys, int64_t width,
                       OnlineSoftmax* heads) {
  uint32_t p_pairs[H][TILE / 2];
  for (int h = 0; h < H; h++)
    for (int s = 0; s < TILE; s += 2 * LANES) {
      auto a = load<FloatVec>(p[h] + s), b = load<FloatVec>(p[h] + s + LANES);
      Bf16x2Vec first = round_to_bf16(even_lanes(a, b)), second = round_to_bf16(odd_lanes(a, b));
      Bf16x2Vec both = (first >> 16) | (second & 0xffff0000u);
      std::memcpy(&p_pairs[h][s / 2], &both, sizeof both);
    }
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES) {
    FloatVec even[H], odd[H];  // of the 32 values from d on
    for (int h = 0; h < H; h++) {
      auto a = load<FloatVec>(heads[h].values + d), b = load<FloatVec>(heads[h].values + d + LANES);
      even[h] = even_lanes(a, b);
      odd[h] = odd_lanes(a, b);
    }
    for (int64_t s = 0; s < n_keys; s += 2) {
      auto a = load<Bf16x2Vec>(v + s * stride + d);
      auto b = s + 1 < n_keys ? load<Bf16x2Vec>(v + (s + 1) * stride + d) : Bf16x2Vec{};
      Bf16x2Vec first = (a & 0xffffu) | (b << 16), second = (a >> 16) | (b & 0xffff0000u);
      for (int h = 0; h < H; h++) {
        even[h] = multiply_add(even[h], first, p_pairs[h][s / 2]);
        odd[h] = multiply_add(odd[h], second, p_pairs[h][s / 2]);
      }
    }
    for (int h = 0; h < H; h++) {
      store(heads[h].values + d, interleave_low(even[h], odd[h]));
      store(heads[h].values + d + LANES, interleave_high(even[h], odd[h]));
    }
  }
  for (; d < width; d++)
    for (int h = 0; h < H; h++)
      for (int64_t s = 0; s < n_keys; s++) heads[h].values[d] += p[h][s] * float(v[s * stride + d]);
}

// One kv head of one sequence: strided keys k (S, K) and values v (S, Kv), and its query heads q (H / G, K).
template <class T>
struct KvHead {
  const T *q, *k, *v;
  const bool* mask;  // (S,), true = visible
  int64_t k_stride, v_stride, dim, width;
  float scale;

  // Adds keys begin .. end to the softmax of n_heads <= MAX_TOKENS heads, from the head `first` on.
  void attend(int64_t begin, int64_t end, int64_t first, int64_t n_heads, OnlineSoftmax* heads) const {
    using Add = void (*)(const float (*)[TILE], const T*, int64_t, int64_t, int64_t, OnlineSoftmax*);
    static constexpr Add ADD[] = {accumulate_values<1>, accumulate_values<2>, accumulate_values<3>,
                                  accumulate_values<4>, accumulate_values<5>, accumulate_values<6>,
                                  accumulate_values<7>, accumulate_values<8>};
    alignas(64) float p[MAX_TOKENS][TILE] = {}, masked[TILE];  // scores, then probabilities; below zero = masked
    for (int64_t tile = begin; tile < end; tile += TILE) {
      int64_t n_keys = std::min<int64_t>(TILE, end - tile);
      for (int64_t s = 0; s < n_keys; s += LANES) {
        const T* keys[LANES];  // beyond the last key, the last key again
        for (int64_t i = 0; i < LANES; i++) {
          keys[i] = k + std::min(tile + s + i, end - 1) * k_stride;
          auto next = reinterpret_cast<const char*>(keys[i] + LANES * k_stride);  // the key 16 keys ahead
          for (int64_t line = 0; line < dim * int64_t(sizeof(T)); line += 64) __builtin_prefetch(next + line);
        }
        for (int64_t h = 0; h < n_heads; h++) store(p[h] + s, dots(q + (first + h) * dim, keys, dim) * scale);
      }
      for (int64_t s = 0; s < TILE; s++) masked[s] = s < n_keys && mask[tile + s] ? 0 : -1;
      for (int64_t h = 0; h < n_heads; h++) update(p[h], masked, heads[h]);
      ADD[n_heads - 1](p, v + tile * v_stride, v_stride, n_keys, width, heads);
    }
  }

  // Turns the scores p of a tile into unnormalised probabilities, and rescales the head's sums to the new maximum.
  void update(float* p, const float* masked, OnlineSoftmax& head) const {
    FloatVec max_lanes = FloatVec{} + head.max_score, total = {};
    for (int s = 0; s < TILE; s += LANES) {
      FloatVec score = load<FloatVec>(masked + s) < 0.f ? FloatVec{} + MASKED_SCORE : load<FloatVec>(p + s);
      max_lanes = score > max_lanes ? score : max_lanes;
      store(p + s, score);
    }
    float max_score = max_lanes[0];
    for (int lane = 1; lane < LANES; lane++) max_score = std::max(max_score, max_lanes[lane]);
    for (int s = 0; s < TILE; s += LANES) {
      FloatVec score = load<FloatVec>(p + s), weight = exp_approx(score - max_score);
      weight = score < NO_SCORE ? FloatVec{} : weight;
      total += weight;
      store(p + s, weight);
    }
    float rescale = std::exp(head.max_score - max_score);
    if (rescale < 1)
      for (int64_t i = 0; i < width; i++) head.values[i] *= rescale;
    head.total = head.total * rescale + total;
    head.max_score = max_score;
  }
};

// Adds the keys that `other` has seen to `sum`.
void merge(OnlineSoftmax& sum, const OnlineSoftmax& other, int64_t width) {
  float max_score = std::max(sum.max_score, other.max_score);
  float keep = std::exp(sum.max_score - max_score), add = std::exp(other.max_score - max_score);
  for (int64_t d = 0; d < width; d++) sum.values[d] = sum.values[d] * keep + other.values[d] * add;
  sum.total = sum.total * keep + other.total * add;
  sum.max_score = max_score;
}

// The number of keys of each sequence up to its last visible one, at least 1: later keys are not read.
std::vector<int64_t> visible_lengths(const Tensor& mask) {
  std::vector<int64_t> lengths(mask.size(0));
  for (int64_t b = 0; b < mask.size(0); b++) {
    const bool* visible = mask.const_data_ptr<bool>() + b * mask.stride(0);
    int64_t n = mask.size(3);
    while (n > 1 && !visible[n - 1]) n--;
    lengths[b] = n;
  }
  return lengths;
}

// As `attend`, checked: the last dimension of k, v and mask has stride 1, and q is contiguous.
template <class T>
Tensor attend_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  int64_t batch = q.size(0), n_heads = q.size(2), groups = k.size(2), per_group = n_heads / groups, width = v.size(3);
  Tensor out = at::empty({batch, 1, n_heads, width}, q.options());
  std::vector<int64_t> n_keys = visible_lengths(mask);
  int64_t longest = *std::max_element(n_keys.begin(), n_keys.end());
  // Keys are split where sequences and kv heads are too few for the threads.
  int64_t work = batch * groups, threads = at::get_num_threads();
  int64_t splits = std::max<int64_t>(1, std::min((threads + work - 1) / work, longest / (2 * TILE)));
  std::vector<float> values(work * splits * per_group * width);
  std::vector<OnlineSoftmax> heads(work * splits * per_group);  // (B, G, splits, H / G)
  for (size_t i = 0; i < heads.size(); i++) heads[i] = OnlineSoftmax{NO_SCORE, FloatVec{}, values.data() + i * width};
  int64_t grain = work * splits * longest * per_group < 2 * TILE * MAX_TOKENS ? work * splits : 1;
  at::parallel_for(0, work * splits, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t b = i / splits / groups, g = i / splits % groups, split = i % splits;
      KvHead<T> head{q.const_data_ptr<T>() + b * q.stride(0) + g * per_group * q.stride(2),
                     k.const_data_ptr<T>() + b * k.stride(0) + g * k.stride(2),
                     v.const_data_ptr<T>() + b * v.stride(0) + g * v.stride(2),
                     mask.const_data_ptr<bool>() + b * mask.stride(0),
                     k.stride(1), v.stride(1), k.size(3), width, float(scale)};
      for (int64_t first = 0; first < per_group; first += MAX_TOKENS)
        head.attend(n_keys[b] * split / splits, n_keys[b] * (split + 1) / splits, first,
                    std::min<int64_t>(MAX_TOKENS, per_group - first), &heads[i * per_group + first]);
    }
  });
  T* to = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < work; i++)
    for (int64_t h = 0; h < per_group; h++, to += width) {
      OnlineSoftmax& sum = heads[i * splits * per_group + h];
      for (int64_t split = 1; split < splits; split++) merge(sum, heads[(i * splits + split) * per_group + h], width);
      float total = 0;
      for (int lane = 0; lane < LANES; lane++) total += sum.total[lane];
      float reciprocal = 1 / total;
      for (int64_t d = 0; d < width; d++) to[d] = sum.values[d] * reciprocal;
    }
  return out;
}

// q (B, 1, H, K), k (B, S, G, K), v (B, S, G, Kv), mask (B | 1, 1, 1, S) bool -> (B, 1, H, Kv). Each sequence must see
// at least one key.
Tensor attend(const Tensor& q, const Tensor& k_, const Tensor& v_, const Tensor& mask_, double scale) {
  TORCH_CHECK(q.dim() == 4 && k_.dim() == 4 && v_.dim() == 4 && mask_.dim() == 4, "attend takes 4 dimensions");
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, "attend takes fp32 or bf16, not ",
              q.scalar_type());
  TORCH_CHECK(k_.scalar_type() == q.scalar_type() && v_.scalar_type() == q.scalar_type(), "keys of ", k_.scalar_type(),
              " and values of ", v_.scalar_type(), " do not fit queries of ", q.scalar_type());
  TORCH_CHECK(mask_.scalar_type() == at::kBool, "the mask must be bool, not ", mask_.scalar_type());
  int64_t batch = q.size(0), n_keys = k_.size(1), groups = k_.size(2);
  TORCH_CHECK(q.size(1) == 1 && groups > 0 && q.size(2) % groups == 0 && n_keys > 0 && k_.size(0) == batch &&
              k_.size(3) == q.size(3) && v_.size(0) == batch && v_.size(1) == n_keys && v_.size(2) == groups,
              "keys ", k_.sizes(), " and values ", v_.sizes(), " do not fit queries ", q.sizes());
  if (batch == 0) return at::empty({0, 1, q.size(2), v_.size(3)}, q.options());
  auto dense_last = [](const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); };
  Tensor k = dense_last(k_), v = dense_last(v_), mask = dense_last(mask_.expand({batch, 1, 1, n_keys}));
  if (q.scalar_type() == at::kFloat) return attend_of<float>(q.contiguous(), k, v, mask, scale);
  return attend_of<bf16>(q.contiguous(), k, v, mask, scale);
}

// positions (B, T) int64 -> bool (B, 1, T, S): each token sees the keys up to its own position.
Tensor visible(const Tensor& positions_, int64_t n_keys) {
  TORCH_CHECK(positions_.dim() == 2 && positions_.scalar_type() == at::kLong, "positions must be (B, T) int64");
  TORCH_CHECK(n_keys >= 0, n_keys, " keys");
  Tensor positions = positions_.contiguous();
  Tensor out = at::zeros({positions.size(0), 1, positions.size(1), n_keys}, positions.options().dtype(at::kBool));
  bool* to = out.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < positions.numel(); i++, to += n_keys)
    std::fill_n(to, std::clamp<int64_t>(positions.const_data_ptr<int64_t>()[i] + 1, 0, n_keys), true);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mini_llm, ops) {  // cpu_moe.py defines more in this namespace
  ops.def("linear(Tensor x, Tensor weight, Tensor? scale, int n_outputs) -> Tensor");
  ops.def("experts(Tensor x, Tensor chosen, Tensor[] held) -> Tensor");
  ops.def("expert_linear(Tensor x, Tensor chosen, Tensor stack, Tensor? scale, int n_outputs) -> Tensor");
  ops.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
  ops.def("visible(Tensor positions, SymInt n_keys) -> Tensor");
}

TORCH_LIBRARY_IMPL(mini_llm, CPU, ops) {
  ops.impl("linear", linear);
  ops.impl("experts", experts);
  ops.impl("expert_linear", expert_linear);
  ops.impl("attend", attend);
  ops.impl("visible", visible);
}
