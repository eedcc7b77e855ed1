// The products of a decoding step on a processor: a few rows times large weights, and attention of one query a row.
//
// Shapes: N rows, D inputs, F outputs, E experts, A chosen ones a row; B batch, S keys, H heads, G groups, K head dim.
// 32 outputs are computed side by side, so a weight is kept packed (kernels.py), its inputs in steps of one (fp32),
// two (bf16) or four (int8): (F / 32, steps, 32, inputs of a step), zeros where F or D has no more. Each thread then
// reads one stretch of memory from its start to its end. Activations are fp32 or bf16, sums are fp32.

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

constexpr int LANES = 16, OUTPUTS = 2 * LANES;  // numbers of a vector; outputs side by side
constexpr int ROWS = 8;  // that share one read of a weight, and heads one of a value

typedef float Floats __attribute__((vector_size(64)));     // 16 numbers
typedef uint32_t Pairs __attribute__((vector_size(64)));   // 16 pairs of bf16, the first of a pair in the low half
typedef int32_t Ints __attribute__((vector_size(64)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

template <class V>
inline V read(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void write(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline Floats low(Pairs pairs) { return (Floats)(pairs << 16); }
inline Floats high(Pairs pairs) { return (Floats)(pairs & 0xffff0000u); }

// e^x as 2^n 2^f, the latter by its Taylor series: |f| <= 1/2, where the rest is 1e-7. What is too small becomes 1e-38.
inline Floats exponential(Floats x) {
  Floats least = Floats{} - 87, most = Floats{} + 88, half = Floats{} + 0.5f;
  x = x < least ? least : x > most ? most : x;
  Floats z = x * 1.44269504f;
  Ints n = __builtin_convertvector(z < 0.f ? z - half : z + half, Ints);  // the nearest
  Floats f = (z - __builtin_convertvector(n, Floats)) * 0.693147181f, sum = f / 720 + 1.f / 120;
  sum = sum * f + 1.f / 24;
  sum = sum * f + 1.f / 6;
  sum = sum * f + 0.5f;
  sum = sum * f + 1.f;
  sum = sum * f + 1.f;
  return (Floats)((Ints)sum + (n << 23));
}

// A step of the weights of 16 outputs, and their sums with what they are multiplied by added.
struct Fours { Pairs first, second; };
inline Floats weights(const float* from) { return read<Floats>(from); }
inline Pairs weights(const bf16* from) { return read<Pairs>(from); }
inline Pairs pairs_of(Ints first, Ints second) {  // a whole number of 8 bits is exact in bf16
  auto a = (Pairs)__builtin_convertvector(first, Floats), b = (Pairs)__builtin_convertvector(second, Floats);
  return (a >> 16) | (b & 0xffff0000u);
}
inline Fours weights(const int8_t* from) {
  auto four = read<Ints>(from);
  return {pairs_of(four << 24 >> 24, four << 16 >> 24), pairs_of(four << 8 >> 24, four >> 24)};
}
inline Floats multiply_add(Floats sum, Floats w, float x) { return sum + w * x; }
inline Floats multiply_add(Floats sum, Pairs w, Pairs x) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
  return sum + low(w) * low(x) + high(w) * high(x);
#endif
}
inline Floats multiply_add(Floats sum, Pairs w, uint32_t x) { return multiply_add(sum, w, Pairs{} + x); }
inline Floats multiply_add(Floats sum, Fours w, uint64_t x) {
  return multiply_add(multiply_add(sum, w.first, uint32_t(x)), w.second, uint32_t(x >> 32));
}

// What weights of type T are multiplied by: the type of the activations, and as many of them as a step has.
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

// The outputs of R rows: w (steps, 32, ...), x[r] (steps,) -> out (R, 32). Few rows keep several sums of each, or one
// addition would wait for the other.
template <int R, class T, class Step>
void block_of(const T* w, const Step* const* x, int64_t steps, float* out) {
  constexpr int WAYS = R > 2 ? 1 : R > 1 ? 2 : 4, HALF = LANES * PER_STEP<T>;
  Floats sum[WAYS][R][2] = {};
  auto add = [&](int way, int64_t at) {
    auto first = weights(w + at * 2 * HALF), second = weights(w + at * 2 * HALF + HALF);
    for (int r = 0; r < R; r++) {
      sum[way][r][0] = multiply_add(sum[way][r][0], first, x[r][at]);
      sum[way][r][1] = multiply_add(sum[way][r][1], second, x[r][at]);
    }
  };
  int64_t at = 0;
  for (; at + WAYS <= steps; at += WAYS)
    for (int way = 0; way < WAYS; way++) add(way, at + way);
  for (; at < steps; at++) add(0, at);
  for (int r = 0; r < R; r++)
    for (int half = 0; half < 2; half++) {
      for (int way = 1; way < WAYS; way++) sum[0][r][half] += sum[way][r][half];
      write(out + r * OUTPUTS + half * LANES, sum[0][r][half]);
    }
}

// The same for any number of rows: out(r, its 32 sums) is called for each.
template <class T, class Step, class Out>
void block(const T* w, const std::vector<const Step*>& x, int64_t steps, Out out) {
  using Kernel = void (*)(const T*, const Step* const*, int64_t, float*);
  static constexpr Kernel KERNELS[] = {block_of<1, T, Step>, block_of<2, T, Step>, block_of<3, T, Step>,
                                       block_of<4, T, Step>, block_of<5, T, Step>, block_of<6, T, Step>,
                                       block_of<7, T, Step>, block_of<8, T, Step>};
  int64_t rows = x.size(), parts = (rows + ROWS - 1) / ROWS;
  float sums[ROWS * OUTPUTS];
  for (int64_t part = 0; part < parts; part++) {
    int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
    KERNELS[count - 1](w, x.data() + first, steps, sums);
    for (int64_t r = 0; r < count; r++) out(first + r, sums + r * OUTPUTS);
  }
}

// Calls run(first element) with the type of the weights.
template <class Run>
void by_type(const Tensor& weight, Run run) {
  if (weight.scalar_type() == at::kFloat) return run(weight.const_data_ptr<float>());
  if (weight.scalar_type() == at::kBFloat16) return run(weight.const_data_ptr<bf16>());
  TORCH_CHECK(weight.scalar_type() == at::kChar, "weights are fp32, bf16 or int8, not ", weight.scalar_type());
  run(weight.const_data_ptr<int8_t>());
}

// The rows of x (N, D) as weights of `steps` steps read them; in `room` where D is no multiple of a step, with zeros.
template <class T>
auto rows_of(const Tensor& x, int64_t steps, std::vector<typename Input<T>::Value>& room) {
  using Value = typename Input<T>::Value;
  using Step = typename Input<T>::Step;
  int64_t n = x.size(0), d = x.size(1), width = steps * PER_STEP<T>;
  TORCH_CHECK(d <= width && d > width - PER_STEP<T>, "rows of ", d, " numbers, but weights of about ", width, " inputs");
  const Value* from = x.const_data_ptr<Value>();
  if (width != d) {
    room.assign(n * width, Value(0));
    for (int64_t r = 0; r < n; r++) std::copy(from + r * d, from + (r + 1) * d, room.data() + r * width);
    from = room.data();
  }
  std::vector<const Step*> rows(n);
  for (int64_t r = 0; r < n; r++) rows[r] = reinterpret_cast<const Step*>(from + r * width);
  return rows;
}

const float* scales(const Tensor& scale) { return scale.defined() ? scale.const_data_ptr<float>() : nullptr; }

// x (..., D) times weight (F, D), packed, and by scale (F,) where it is given -> (..., F)
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale, int64_t n_outputs) {
  auto sizes = input.sizes().vec();
  sizes.back() = n_outputs;
  Tensor x = input.contiguous().view({-1, input.size(-1)}), out = at::empty(sizes, input.options());
  const float* by = scale.has_value() ? scales(*scale) : nullptr;
  by_type(weight, [&](auto* w) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
    using Value = typename Input<T>::Value;
    int64_t steps = weight.size(1);
    std::vector<Value> room;
    auto rows = rows_of<T>(x, steps, room);
    Value* to = out.mutable_data_ptr<Value>();
    at::parallel_for(0, weight.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        int64_t first = b * OUTPUTS, count = std::min<int64_t>(OUTPUTS, n_outputs - first);
        block(w + first * steps * PER_STEP<T>, rows, steps, [&](int64_t r, const float* sums) {
          for (int64_t i = 0; i < count; i++) to[r * n_outputs + first + i] = by ? sums[i] * by[first + i] : sums[i];
        });
      }
    });
  });
  return out;
}

// Each row through its chosen experts, down(silu(gate(x)) * up(x)): x (N, D), chosen (N, A) -> (N, A, D).
// matrices and scales: of gate, up (E, F / 32, ...) and down (E, D / 32, ...); no scales: none.
Tensor experts(const Tensor& input, const Tensor& chosen_, at::TensorList matrices, at::TensorList scale) {
  TORCH_CHECK(matrices.size() == 3 && (scale.empty() || scale.size() == 3), "gate, up and down are wanted");
  Tensor x = input.contiguous(), chosen = chosen_.contiguous();
  int64_t dim = x.size(1), active = chosen.size(1), pairs = chosen.numel();
  Tensor out = at::empty({x.size(0), active, dim}, x.options());
  const Tensor &gate = matrices[0], &down = matrices[2];
  std::vector<std::vector<int64_t>> of_expert(gate.size(0));  // the pairs of a row and an expert
  for (int64_t i = 0; i < pairs; i++) of_expert.at(chosen.const_data_ptr<int64_t>()[i]).push_back(i);
  std::vector<int64_t> used;
  for (size_t e = 0; e < of_expert.size(); e++)
    if (!of_expert[e].empty()) used.push_back(e);
  const float* by[3] = {};
  for (size_t i = 0; i < scale.size(); i++) by[i] = scales(scale[i]);
  TORCH_CHECK(chosen.size(0) == x.size(0) && matrices[1].sizes() == gate.sizes() && down.size(0) == gate.size(0) &&
              down.size(1) == (dim + OUTPUTS - 1) / OUTPUTS, "the experts do not fit together");

  by_type(gate, [&](auto* first_weight) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(first_weight)>>;
    using Value = typename Input<T>::Value;
    using Step = typename Input<T>::Step;
    const T* w[3] = {first_weight, matrices[1].const_data_ptr<T>(), down.const_data_ptr<T>()};
    std::vector<Value> room;
    auto rows = rows_of<T>(x, gate.size(2), room);
    int64_t in_blocks = gate.size(1), out_blocks = down.size(1), width = in_blocks * OUTPUTS;
    TORCH_CHECK(down.size(2) * PER_STEP<T> <= width, "the experts do not fit together");
    std::vector<Value> hidden(pairs * width);
    std::vector<std::vector<const Step*>> in(used.size()), between(used.size());
    for (size_t u = 0; u < used.size(); u++)
      for (int64_t pair : of_expert[used[u]]) {
        in[u].push_back(rows[pair / active]);
        between[u].push_back(reinterpret_cast<const Step*>(hidden.data() + pair * width));
      }
    auto size_of = [](const Tensor& t) { return t.size(2) * OUTPUTS * PER_STEP<T>; };  // of a block
    at::parallel_for(0, used.size() * in_blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> gates(pairs * OUTPUTS);
      for (int64_t i = begin; i < end; i++) {
        int64_t u = i / in_blocks, b = used[u] * in_blocks + i % in_blocks, first = i % in_blocks * OUTPUTS;
        auto scaled = [&](int which, float sum, int lane) {
          return by[which] ? sum * by[which][b * OUTPUTS + lane] : sum;
        };
        block(w[0] + b * size_of(gate), in[u], gate.size(2), [&](int64_t r, const float* sums) {
          float* gate = &gates[r * OUTPUTS];
          for (int lane = 0; lane < OUTPUTS; lane++) gate[lane] = scaled(0, sums[lane], lane);
          for (int lane = 0; lane < OUTPUTS; lane += LANES) {
            auto g = read<Floats>(gate + lane);
            write(gate + lane, g / (1.f + exponential(-g)));
          }
        });
        block(w[1] + b * size_of(gate), in[u], gate.size(2), [&](int64_t r, const float* sums) {
          Value* to = hidden.data() + of_expert[used[u]][r] * width + first;
          for (int lane = 0; lane < OUTPUTS; lane++) to[lane] = gates[r * OUTPUTS + lane] * scaled(1, sums[lane], lane);
        });
      }
    });
    Value* to = out.mutable_data_ptr<Value>();
    at::parallel_for(0, used.size() * out_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int64_t u = i / out_blocks, b = used[u] * out_blocks + i % out_blocks, first = i % out_blocks * OUTPUTS;
        int64_t count = std::min<int64_t>(OUTPUTS, dim - first);
        block(w[2] + b * size_of(down), between[u], down.size(2), [&](int64_t r, const float* sums) {
          Value* row = to + of_expert[used[u]][r] * dim + first;
          for (int64_t lane = 0; lane < count; lane++)
            row[lane] = by[2] ? sums[lane] * by[2][b * OUTPUTS + lane] : sums[lane];
        });
      }
    });
  });
  return out;
}

// ------------------------------------------------------------------- attention of one query a row

constexpr int TILE = 64;  // keys; their scores are known before their values are read
constexpr float LOWEST = -1e30f, HIDDEN = -2e30f;  // scores that no key has; the first stands for none so far

inline Floats add_products(Floats sum, const float* a, const float* b) {
  return sum + read<Floats>(a) * read<Floats>(b);
}
inline Floats add_products(Floats sum, const bf16* a, const bf16* b) {
  return multiply_add(sum, read<Pairs>(a), read<Pairs>(b));
}

// Lane l: a[l] + a[l ^ W], or where W is a bit of l, the same of b.
template <int W, int... L>
Floats folded(Floats a, Floats b, std::integer_sequence<int, L...>) {
  return SHUFFLED(a, b, (L & W ? LANES + L : L)...) + SHUFFLED(a, b, ((L & W ? LANES : 0) + (L ^ W))...);
}
template <int W>
Floats folded(Floats a, Floats b) { return folded<W>(a, b, std::make_integer_sequence<int, LANES>()); }

// The dot products of q (K,) with 16 keys.
template <class T>
Floats dots(const T* q, const T* const* keys, int64_t dim) {
  constexpr int64_t SIZE = sizeof(Floats) / sizeof(T);
  Floats sum[LANES] = {};
  int64_t i = 0;
  for (; i + SIZE <= dim; i += SIZE)
    for (int s = 0; s < LANES; s++) sum[s] = add_products(sum[s], q + i, keys[s] + i);
  // The numbers of each sum are added up: two sums become one vector of half as many partial sums each, and so on.
  for (int s = 0; s < 8; s++) sum[s] = folded<8>(sum[s], sum[s + 8]);
  for (int s = 0; s < 4; s++) sum[s] = folded<4>(sum[s], sum[s + 4]);
  for (int s = 0; s < 2; s++) sum[s] = folded<2>(sum[s], sum[s + 2]);
  Floats all = folded<1>(sum[0], sum[1]);
  for (; i < dim; i++)
    for (int s = 0; s < LANES; s++) all[s] += float(q[i]) * float(keys[s][i]);
  return all;
}

// What a head has gathered of some keys: the largest score, the sum of exp(score - largest), the values so weighted.
struct Gathered {
  float largest;
  Floats total;  // its lanes added up
  float* values;
};

// values[r] += p[r][s] * v[s] over the keys of a tile; behind them p is zero
template <int R>
void add_values(const float (*p)[TILE], const float* v, int64_t stride, int64_t n_keys, int64_t width, Gathered* to) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) {
    Floats sum[R];
    for (int r = 0; r < R; r++) sum[r] = read<Floats>(to[r].values + d);
    for (int64_t s = 0; s < n_keys; s++) {
      auto value = read<Floats>(v + s * stride + d);
      for (int r = 0; r < R; r++) sum[r] += value * p[r][s];
    }
    for (int r = 0; r < R; r++) write(to[r].values + d, sum[r]);
  }
  for (; d < width; d++)
    for (int r = 0; r < R; r++)
      for (int64_t s = 0; s < n_keys; s++) to[r].values[d] += p[r][s] * v[s * stride + d];
}
// The numbers of two vectors at even and at odd places, and the way back.
inline Floats evens(Floats a, Floats b) {
  return SHUFFLED(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline Floats odds(Floats a, Floats b) {
  return SHUFFLED(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
inline Floats woven(Floats a, Floats b) {
  return SHUFFLED(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Floats woven_end(Floats a, Floats b) {
  return SHUFFLED(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Pairs rounded(Floats x) { return (Pairs)x + 0x7fffu + (((Pairs)x >> 16) & 1u); }  // to bf16, in the high half
template <int R>
void add_values(const float (*p)[TILE], const bf16* v, int64_t stride, int64_t n_keys, int64_t width, Gathered* to) {
  uint32_t by[R][TILE / 2];  // two keys' weights side by side, as their values will be
  for (int r = 0; r < R; r++)
    for (int s = 0; s < TILE; s += 2 * LANES) {
      auto a = read<Floats>(p[r] + s), b = read<Floats>(p[r] + s + LANES);
      Pairs first = rounded(evens(a, b)), second = rounded(odds(a, b));
      Pairs both = (first >> 16) | (second & 0xffff0000u);
      std::memcpy(&by[r][s / 2], &both, sizeof both);
    }
  int64_t d = 0;
  for (; d + 2 * LANES <= width; d += 2 * LANES) {
    Floats even[R], odd[R];  // of the 32 values from d on
    for (int r = 0; r < R; r++) {
      auto a = read<Floats>(to[r].values + d), b = read<Floats>(to[r].values + d + LANES);
      even[r] = evens(a, b), odd[r] = odds(a, b);
    }
    for (int64_t s = 0; s < n_keys; s += 2) {
      auto a = read<Pairs>(v + s * stride + d), b = s + 1 < n_keys ? read<Pairs>(v + (s + 1) * stride + d) : Pairs{};
      Pairs first = (a & 0xffffu) | (b << 16), second = (a >> 16) | (b & 0xffff0000u);
      for (int r = 0; r < R; r++) {
        even[r] = multiply_add(even[r], first, by[r][s / 2]);
        odd[r] = multiply_add(odd[r], second, by[r][s / 2]);
      }
    }
    for (int r = 0; r < R; r++) {
      write(to[r].values + d, woven(even[r], odd[r]));
      write(to[r].values + d + LANES, woven_end(even[r], odd[r]));
    }
  }
  for (; d < width; d++)
    for (int r = 0; r < R; r++)
      for (int64_t s = 0; s < n_keys; s++) to[r].values[d] += p[r][s] * float(v[s * stride + d]);
}

// One group's keys k (S, K) and values v (S, Kv), rows a stride apart, for its heads q (n_heads, K).
template <class T>
struct Group {
  const T *q, *k, *v;
  const bool* mask;  // (S,)
  int64_t k_stride, v_stride, dim, width;
  float scale;

  // `heads` are of at most ROWS heads from `first` on.
  void attend(int64_t begin, int64_t end, int64_t first, int64_t n_heads, Gathered* heads) const {
    using Add = void (*)(const float (*)[TILE], const T*, int64_t, int64_t, int64_t, Gathered*);
    static constexpr Add ADD[] = {add_values<1>, add_values<2>, add_values<3>, add_values<4>,
                                  add_values<5>, add_values<6>, add_values<7>, add_values<8>};
    alignas(64) float p[ROWS][TILE] = {}, hidden[TILE];  // by head; below zero where the mask hides a key
    for (int64_t tile = begin; tile < end; tile += TILE) {
      int64_t n_keys = std::min<int64_t>(TILE, end - tile);
      for (int64_t s = 0; s < n_keys; s += LANES) {
        const T* keys[LANES];  // those behind the last one are the last one
        for (int64_t i = 0; i < LANES; i++) {
          keys[i] = k + std::min(tile + s + i, end - 1) * k_stride;
          auto next = reinterpret_cast<const char*>(keys[i] + LANES * k_stride);  // sixteen rows ahead, in time
          for (int64_t line = 0; line < dim * int64_t(sizeof(T)); line += 64) __builtin_prefetch(next + line);
        }
        for (int64_t r = 0; r < n_heads; r++) write(p[r] + s, dots(q + (first + r) * dim, keys, dim) * scale);
      }
      for (int64_t s = 0; s < TILE; s++) hidden[s] = s < n_keys && mask[tile + s] ? 0 : -1;
      for (int64_t r = 0; r < n_heads; r++) weigh(p[r], hidden, heads[r]);
      ADD[n_heads - 1](p, v + tile * v_stride, v_stride, n_keys, width, heads);
    }
  }

  // Scores become weights, and what was gathered before is brought to the same largest score.
  void weigh(float* p, const float* hidden, Gathered& head) const {
    Floats most = Floats{} + head.largest, total = {};
    for (int s = 0; s < TILE; s += LANES) {
      Floats score = read<Floats>(hidden + s) < 0.f ? Floats{} + HIDDEN : read<Floats>(p + s);
      most = score > most ? score : most;
      write(p + s, score);
    }
    float largest = most[0];
    for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    for (int s = 0; s < TILE; s += LANES) {
      Floats score = read<Floats>(p + s), weight = exponential(score - largest);
      weight = score < LOWEST ? Floats{} : weight;
      total += weight;
      write(p + s, weight);
    }
    float shrunk = std::exp(head.largest - largest);
    if (shrunk < 1)
      for (int64_t i = 0; i < width; i++) head.values[i] *= shrunk;
    head.total = head.total * shrunk + total;
    head.largest = largest;
  }
};

// q (B, 1, H, K), k (B, S, G, K), v (B, S, G, Kv), mask (B, 1, 1, S) bool -> (B, 1, H, Kv). Each row sees some key.
template <class T>
Tensor attend_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  int64_t batch = q.size(0), n_heads = q.size(2), groups = k.size(2), in_group = n_heads / groups, width = v.size(3);
  Tensor out = at::empty({batch, 1, n_heads, width}, q.options());
  std::vector<int64_t> n_keys(batch);  // up to the last visible one: what stands behind it is not even read
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; b++) {
    const bool* seen = mask.const_data_ptr<bool>() + b * mask.stride(0);
    int64_t n = k.size(1);
    while (n > 1 && !seen[n - 1]) n--;
    n_keys[b] = n;
    longest = std::max(longest, n);
  }
  // Keys are shared out where rows and groups are too few for the threads.
  int64_t work = batch * groups, threads = at::get_num_threads();
  int64_t parts = std::max<int64_t>(1, std::min((threads + work - 1) / work, longest / (2 * TILE)));
  std::vector<float> values(work * parts * in_group * width);
  std::vector<Gathered> gathered(work * parts * in_group);
  for (size_t i = 0; i < gathered.size(); i++) gathered[i] = Gathered{LOWEST, Floats{}, values.data() + i * width};
  int64_t grain = work * parts * longest * in_group < 2 * TILE * ROWS ? work * parts : 1;
  at::parallel_for(0, work * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t b = i / parts / groups, g = i / parts % groups, part = i % parts;
      Group<T> group{q.const_data_ptr<T>() + b * q.stride(0) + g * in_group * q.stride(2),
                     k.const_data_ptr<T>() + b * k.stride(0) + g * k.stride(2),
                     v.const_data_ptr<T>() + b * v.stride(0) + g * v.stride(2),
                     mask.const_data_ptr<bool>() + b * mask.stride(0),
                     k.stride(1), v.stride(1), k.size(3), width, float(scale)};
      for (int64_t first = 0; first < in_group; first += ROWS)
        group.attend(n_keys[b] * part / parts, n_keys[b] * (part + 1) / parts, first,
                     std::min<int64_t>(ROWS, in_group - first), &gathered[i * in_group + first]);
    }
  });
  T* to = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < work; i++)
    for (int64_t h = 0; h < in_group; h++, to += width) {
      Gathered& sum = gathered[i * parts * in_group + h];
      for (int64_t part = 1; part < parts; part++) {
        const Gathered& more = gathered[(i * parts + part) * in_group + h];
        float largest = std::max(sum.largest, more.largest);
        float keep = std::exp(sum.largest - largest), by = std::exp(more.largest - largest);
        for (int64_t d = 0; d < width; d++) sum.values[d] = sum.values[d] * keep + more.values[d] * by;
        sum.total = sum.total * keep + more.total * by;
        sum.largest = largest;
      }
      float total = 0;
      for (int lane = 0; lane < LANES; lane++) total += sum.total[lane];
      float by = 1 / total;
      for (int64_t d = 0; d < width; d++) to[d] = sum.values[d] * by;
    }
  return out;
}

Tensor attend(const Tensor& q, const Tensor& k_, const Tensor& v_, const Tensor& mask_, double scale) {
  auto by_rows = [](const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); };
  int64_t batch = q.size(0), n_keys = k_.size(1), groups = k_.size(2);
  TORCH_CHECK(q.size(1) == 1 && groups > 0 && q.size(2) % groups == 0 && k_.size(0) == batch && k_.size(3) == q.size(3) &&
              v_.size(0) == batch && v_.size(1) == n_keys && v_.size(2) == groups && n_keys > 0,
              "keys ", k_.sizes(), " and values ", v_.sizes(), " do not fit queries ", q.sizes());
  if (batch == 0) return at::empty({0, 1, q.size(2), v_.size(3)}, q.options());
  Tensor k = by_rows(k_), v = by_rows(v_), mask = by_rows(mask_.expand({batch, 1, 1, n_keys}));
  if (q.scalar_type() == at::kFloat) return attend_of<float>(q.contiguous(), k, v, mask, scale);
  return attend_of<bf16>(q.contiguous(), k, v, mask, scale);
}

// positions (B, T) -> bool (B, 1, T, S): each sees the keys up to its own place
Tensor visible(const Tensor& positions_, int64_t n_keys) {
  Tensor positions = positions_.contiguous();
  Tensor out = at::zeros({positions.size(0), 1, positions.size(1), n_keys}, positions.options().dtype(at::kBool));
  bool* to = out.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < positions.numel(); i++, to += n_keys)
    std::fill_n(to, std::clamp<int64_t>(positions.const_data_ptr<int64_t>()[i] + 1, 0, n_keys), true);
  return out;
}

}  // namespace

TORCH_LIBRARY(mini_llm, ops) {
  ops.def("linear(Tensor x, Tensor weight, Tensor? scale, int n_outputs) -> Tensor");
  ops.def("experts(Tensor x, Tensor chosen, Tensor[] matrices, Tensor[] scales) -> Tensor");
  ops.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
  ops.def("visible(Tensor positions, SymInt n_keys) -> Tensor");
}

TORCH_LIBRARY_IMPL(mini_llm, CPU, ops) {
  ops.impl("linear", linear);
  ops.impl("experts", experts);
  ops.impl("attend", attend);
  ops.impl("visible", visible);
}
