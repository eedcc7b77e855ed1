// The products of a decoding step on a processor: a few rows times large weights, and attention of one query a row.
//
// Shapes: N rows, D inputs, F outputs, E experts, A chosen ones a row, B batch, S keys, H heads, G groups of them, K head dim.
// Sixteen outputs are computed side by side, so a weight is kept packed (kernels.py), its inputs in steps of one (fp32),
// two (bf16) or four (int8): (F / 16, steps, 16, inputs of a step), zeros where F or D has no more. Each thread then
// reads one stretch of memory from its start to its end. Activations are fp32 or bf16, sums are fp32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using bf16 = at::BFloat16;

constexpr int LANES = 16, ROWS = 8;  // outputs side by side; rows that share one read of a weight

typedef float Floats __attribute__((vector_size(64)));     // 16 numbers
typedef uint32_t Pairs __attribute__((vector_size(64)));   // 16 pairs of bf16, the first of a pair in the low half
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class V>
inline V read(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void write(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline Floats low(Pairs pairs) { return (Floats)(pairs << 16); }
inline Floats high(Pairs pairs) { return (Floats)(pairs & 0xffff0000u); }
inline Floats widen(const bf16* from) { return (Floats)(__builtin_convertvector(read<Halves>(from), Pairs) << 16); }
inline Floats widen(const float* from) { return read<Floats>(from); }

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

// 16 outputs of R rows: w (steps, 16, ...), x[r] (steps,) -> out (R, 16). Several sums are kept, or each would wait for itself.
template <int R, class T, class Step>
void block_of(const T* w, const Step* const* x, int64_t steps, float* out) {
  constexpr int WAYS = R > 4 ? 1 : R > 2 ? 2 : R > 1 ? 4 : 8, SIZE = LANES * PER_STEP<T>;
  Floats sum[WAYS][R] = {};
  int64_t at = 0;
  for (; at + WAYS <= steps; at += WAYS)
    for (int way = 0; way < WAYS; way++) {
      auto some = weights(w + (at + way) * SIZE);
      for (int r = 0; r < R; r++) sum[way][r] = multiply_add(sum[way][r], some, x[r][at + way]);
    }
  for (; at < steps; at++)
    for (int r = 0; r < R; r++) sum[0][r] = multiply_add(sum[0][r], weights(w + at * SIZE), x[r][at]);
  for (int r = 0; r < R; r++) {
    for (int way = 1; way < WAYS; way++) sum[0][r] += sum[way][r];
    write(out + r * LANES, sum[0][r]);
  }
}

// The same for any number of rows: out(r, 16 sums) is called for each.
template <class T, class Step, class Out>
void block(const T* w, const std::vector<const Step*>& x, int64_t steps, Out out) {
  using Kernel = void (*)(const T*, const Step* const*, int64_t, float*);
  static constexpr Kernel KERNELS[] = {block_of<1, T, Step>, block_of<2, T, Step>, block_of<3, T, Step>,
                                       block_of<4, T, Step>, block_of<5, T, Step>, block_of<6, T, Step>,
                                       block_of<7, T, Step>, block_of<8, T, Step>};
  int64_t rows = x.size(), parts = (rows + ROWS - 1) / ROWS;
  float sums[ROWS * LANES];
  for (int64_t part = 0; part < parts; part++) {
    int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
    KERNELS[count - 1](w, x.data() + first, steps, sums);
    for (int64_t r = 0; r < count; r++) out(first + r, sums + r * LANES);
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

// The rows of x (N, D) as a weight of `steps` steps reads them: a D that is no multiple of a step goes on with zeros, in `room`.
template <class T>
auto rows_of(const Tensor& x, int64_t steps, std::vector<typename Input<T>::Value>& room) {
  using Value = typename Input<T>::Value;
  using Step = typename Input<T>::Step;
  int64_t n = x.size(0), d = x.size(1), width = steps * PER_STEP<T>;
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
        int64_t first = b * LANES, count = std::min<int64_t>(LANES, n_outputs - first);
        block(w + first * steps * PER_STEP<T>, rows, steps, [&](int64_t r, const float* sums) {
          for (int64_t i = 0; i < count; i++) to[r * n_outputs + first + i] = by ? sums[i] * by[first + i] : sums[i];
        });
      }
    });
  });
  return out;
}

// Each row through its chosen experts, down(silu(gate(x)) * up(x)): x (N, D), chosen (N, A) -> (N, A, D).
// matrices and scales: of gate, up (E, F / 16, ...) and down (E, D / 16, ...); no scales: none.
Tensor experts(const Tensor& input, const Tensor& chosen_, at::TensorList matrices, at::TensorList scale) {
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

  by_type(gate, [&](auto* first_weight) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(first_weight)>>;
    using Value = typename Input<T>::Value;
    using Step = typename Input<T>::Step;
    const T* w[3] = {first_weight, matrices[1].const_data_ptr<T>(), down.const_data_ptr<T>()};
    std::vector<Value> room;
    auto rows = rows_of<T>(x, gate.size(2), room);
    int64_t in_blocks = gate.size(1), out_blocks = down.size(1), width = in_blocks * LANES;
    std::vector<Value> hidden(pairs * width);
    std::vector<std::vector<const Step*>> in(used.size()), between(used.size());
    for (size_t u = 0; u < used.size(); u++)
      for (int64_t pair : of_expert[used[u]]) {
        in[u].push_back(rows[pair / active]);
        between[u].push_back(reinterpret_cast<const Step*>(hidden.data() + pair * width));
      }
    auto size_of = [](const Tensor& t) { return t.size(2) * LANES * PER_STEP<T>; };  // of a block
    at::parallel_for(0, used.size() * in_blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> gates(pairs * LANES);
      for (int64_t i = begin; i < end; i++) {
        int64_t u = i / in_blocks, b = used[u] * in_blocks + i % in_blocks, first = i % in_blocks * LANES;
        auto scaled = [&](int which, float sum, int lane) { return by[which] ? sum * by[which][b * LANES + lane] : sum; };
        block(w[0] + b * size_of(gate), in[u], gate.size(2), [&](int64_t r, const float* sums) {
          for (int lane = 0; lane < LANES; lane++) {
            float g = scaled(0, sums[lane], lane);
            gates[r * LANES + lane] = g / (1 + std::exp(-g));
          }
        });
        block(w[1] + b * size_of(gate), in[u], gate.size(2), [&](int64_t r, const float* sums) {
          Value* to = hidden.data() + of_expert[used[u]][r] * width + first;
          for (int lane = 0; lane < LANES; lane++) to[lane] = gates[r * LANES + lane] * scaled(1, sums[lane], lane);
        });
      }
    });
    Value* to = out.mutable_data_ptr<Value>();
    at::parallel_for(0, used.size() * out_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int64_t u = i / out_blocks, b = used[u] * out_blocks + i % out_blocks, first = i % out_blocks * LANES;
        int64_t count = std::min<int64_t>(LANES, dim - first);
        block(w[2] + b * size_of(down), between[u], down.size(2), [&](int64_t r, const float* sums) {
          Value* row = to + of_expert[used[u]][r] * dim + first;
          for (int64_t lane = 0; lane < count; lane++)
            row[lane] = by[2] ? sums[lane] * by[2][b * LANES + lane] : sums[lane];
        });
      }
    });
  });
  return out;
}

// ------------------------------------------------------------------- attention of one query a row

constexpr int TILE = 64;  // keys; their scores are known before their values are read
constexpr float LOWEST = -1e30f;  // a score that no key has

inline Floats add_products(Floats sum, const float* a, const float* b) { return sum + read<Floats>(a) * read<Floats>(b); }
inline Floats add_products(Floats sum, const bf16* a, const bf16* b) { return multiply_add(sum, read<Pairs>(a), read<Pairs>(b)); }

// The dot products of q (K,) with 16 keys.
template <class T>
Floats dots(const T* q, const T* const* keys, int64_t dim) {
  constexpr int64_t SIZE = sizeof(Floats) / sizeof(T);
  Floats sum[LANES] = {};
  int64_t i = 0;
  for (; i + SIZE <= dim; i += SIZE)
    for (int s = 0; s < LANES; s++) sum[s] = add_products(sum[s], q + i, keys[s] + i);
  // The numbers of each sum are added up: halves of two sums side by side, then quarters of four, until one holds all.
  for (int s = 0; s < 8; s++)
    sum[s] = __builtin_shuffle(sum[s], sum[s + 8], Ints{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
             __builtin_shuffle(sum[s], sum[s + 8], Ints{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
  for (int s = 0; s < 4; s++)
    sum[s] = __builtin_shuffle(sum[s], sum[s + 4], Ints{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}) +
             __builtin_shuffle(sum[s], sum[s + 4], Ints{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
  for (int s = 0; s < 2; s++)
    sum[s] = __builtin_shuffle(sum[s], sum[s + 2], Ints{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
             __builtin_shuffle(sum[s], sum[s + 2], Ints{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  Floats all = __builtin_shuffle(sum[0], sum[1], Ints{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}) +
               __builtin_shuffle(sum[0], sum[1], Ints{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
  for (; i < dim; i++)
    for (int s = 0; s < LANES; s++) all[s] += float(q[i]) * float(keys[s][i]);
  return all;
}

// What a head has gathered of some keys: the largest score, the sum of exp(score - largest), and the values so weighted.
struct Gathered {
  float largest, total;
  float* values;
};

// values[r] += p[r][s] * v[s] over the keys of a tile, 16 numbers at a time
template <int R, class T>
void add_values(const float (*p)[TILE], const T* v, int64_t stride, int64_t n_keys, int64_t width, Gathered* to) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) {
    Floats sum[R];
    for (int r = 0; r < R; r++) sum[r] = read<Floats>(to[r].values + d);
    for (int64_t s = 0; s < n_keys; s++) {
      Floats value = widen(v + s * stride + d);
      for (int r = 0; r < R; r++) sum[r] += value * p[r][s];
    }
    for (int r = 0; r < R; r++) write(to[r].values + d, sum[r]);
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
    static constexpr Add ADD[] = {add_values<1, T>, add_values<2, T>, add_values<3, T>, add_values<4, T>,
                                  add_values<5, T>, add_values<6, T>, add_values<7, T>, add_values<8, T>};
    alignas(64) float p[ROWS][TILE];
    for (int64_t tile = begin; tile < end; tile += TILE) {
      int64_t n_keys = std::min<int64_t>(TILE, end - tile);
      for (int64_t s = 0; s < n_keys; s += LANES) {
        const T* keys[LANES];  // those behind the last one are the last one
        for (int64_t i = 0; i < LANES; i++) keys[i] = k + std::min(tile + s + i, end - 1) * k_stride;
        for (int64_t r = 0; r < n_heads; r++) write(p[r] + s, dots(q + (first + r) * dim, keys, dim) * scale);
      }
      for (int64_t r = 0; r < n_heads; r++) weigh(p[r], mask + tile, n_keys, heads[r]);
      ADD[n_heads - 1](p, v + tile * v_stride, v_stride, n_keys, width, heads);
    }
  }

  // Scores become weights, and what was gathered before is brought to the same largest score.
  void weigh(float* p, const bool* seen, int64_t n_keys, Gathered& head) const {
    float largest = head.largest, total = 0;
    for (int64_t s = 0; s < n_keys; s++) largest = seen[s] ? std::max(largest, p[s]) : largest;
    for (int64_t s = 0; s < n_keys; s++) p[s] = std::exp(p[s] - largest);
    for (int64_t s = 0; s < n_keys; s++) p[s] = seen[s] ? p[s] : 0;
    for (int64_t s = 0; s < n_keys; s++) total += p[s];
    float shrunk = std::exp(head.largest - largest);
    for (int64_t i = 0; i < width; i++) head.values[i] *= shrunk;
    head.total = head.total * shrunk + total;
    head.largest = largest;
  }
};

// q (B, 1, H, K), k (B, S, G, K), v (B, S, G, Kv), mask (B, 1, 1, S) bool -> (B, 1, H, Kv). Each row sees a key at least.
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
  for (size_t i = 0; i < gathered.size(); i++) gathered[i] = {LOWEST, 0, values.data() + i * width};
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
      float by = 1 / sum.total;
      for (int64_t d = 0; d < width; d++) to[d] = sum.values[d] * by;
    }
  return out;
}

Tensor attend(const Tensor& q, const Tensor& k_, const Tensor& v_, const Tensor& mask_, double scale) {
  auto by_rows = [](const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); };
  Tensor k = by_rows(k_), v = by_rows(v_), mask = by_rows(mask_);
  if (q.scalar_type() == at::kFloat) return attend_of<float>(q.contiguous(), k, v, mask, scale);
  return attend_of<bf16>(q.contiguous(), k, v, mask, scale);
}

}  // namespace

TORCH_LIBRARY(mini_llm, ops) {
  ops.def("linear(Tensor x, Tensor weight, Tensor? scale, int n_outputs) -> Tensor");
  ops.def("experts(Tensor x, Tensor chosen, Tensor[] matrices, Tensor[] scales) -> Tensor");
  ops.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(mini_llm, CPU, ops) {
  ops.impl("linear", linear);
  ops.impl("experts", experts);
  ops.impl("attend", attend);
}
