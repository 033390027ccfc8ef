// The two passes of LAMB over a rank's memory: reference.py's IEEE operations in reference.py's order, so that bits are
// the same, on any number of threads. Compile with -ffp-contract=off: a fused multiply-add rounds once less.
//
// A plain C interface, loaded by ctypes: no header of Python or torch is needed, and no version of them compiled in.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int BLOCK = 256;  // elements; layout.BLOCK
constexpr int AHEAD = 2 * BLOCK;  // elements that are fetched before they are needed: pages end every fourth block

enum Dtype : int64_t { NONE = -1, F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };

// A run of blocks in memory, counted from its start; the last one may be short.
struct Run {
  char *weight, *model, *grad, *exp_avg, *exp_avg_sq;
  const int64_t *block_param;  // [blocks] the parameter of each block; null: all are `param`'s
  int64_t numel, param;
  int64_t first_block;  // blocks of the runs before
  int64_t weight_dtype, model_dtype, grad_dtype, state_dtype;

  int64_t owner(int64_t block) const { return block_param ? block_param[block] : param; }
  int size(int64_t block) const {
    const int64_t left = numel - block * BLOCK;
    return left < BLOCK ? int(left) : BLOCK;
  }
};

template <typename T>
struct Coefficients {  // rule.Coefficients, a row of rule.table
  T grad_scale, l2, beta1, c1, beta2, c2, unbias1, unbias2, eps_inside, eps_outside, decay;
};

// -- vectors: 64 bytes, however wide the machine's are ------------------------------------------------

template <typename T>
struct Wide {
  typedef T V __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int LANES = 64 / sizeof(T);
  static constexpr int COUNT = BLOCK / LANES;
};

template <typename T>
INLINE typename Wide<T>::V &at(T *memory, int j) {
  return *reinterpret_cast<typename Wide<T>::V *>(memory + j * Wide<T>::LANES);
}

INLINE Wide<float>::V root(Wide<float>::V x) {
  Wide<float>::V y;
#if defined(__AVX512F__)
  _mm512_storeu_ps((float *)&y, _mm512_sqrt_ps(_mm512_loadu_ps((float *)&x)));
#elif defined(__AVX__)
  for (int i = 0; i < 16; i += 8) _mm256_storeu_ps((float *)&y + i, _mm256_sqrt_ps(_mm256_loadu_ps((float *)&x + i)));
#else
  for (int i = 0; i < 16; i++) y[i] = std::sqrt(x[i]);
#endif
  return y;
}

INLINE Wide<double>::V root(Wide<double>::V x) {
  Wide<double>::V y;
#if defined(__AVX512F__)
  _mm512_storeu_pd((double *)&y, _mm512_sqrt_pd(_mm512_loadu_pd((double *)&x)));
#elif defined(__AVX__)
  for (int i = 0; i < 8; i += 4) _mm256_storeu_pd((double *)&y + i, _mm256_sqrt_pd(_mm256_loadu_pd((double *)&x + i)));
#else
  for (int i = 0; i < 8; i++) y[i] = std::sqrt(x[i]);
#endif
  return y;
}

template <typename T>
struct Pair {
  typename Wide<T>::V weight, update;
  INLINE Pair operator+(const Pair &other) const { return {weight + other.weight, update + other.update}; }
};

template <typename T>
struct Single {
  typename Wide<T>::V value;
  INLINE Single operator+(const Single &other) const { return {value + other.value}; }
};

// The sum of `leaf(j)` over a block's vectors by halving: first half plus second half until one vector is left.
template <int LEAVES, int COUNT, typename Leaf>
INLINE auto by_halving(int j, Leaf &leaf) {
  if constexpr (LEAVES == 1) {
    return leaf(j);
  } else {
    auto first = by_halving<LEAVES / 2, COUNT>(j, leaf);
    return first + by_halving<LEAVES / 2, COUNT>(j + COUNT / LEAVES, leaf);
  }
}

template <typename T>
INLINE T across_lanes(typename Wide<T>::V x) {
  T lanes[Wide<T>::LANES];
  std::memcpy(lanes, &x, sizeof(lanes));
  for (int half = Wide<T>::LANES / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// -- dtypes -------------------------------------------------------------------------------------------

template <typename T>
constexpr int64_t own_dtype() {
  return sizeof(T) == 4 ? F32 : F64;
}

INLINE int64_t size_of(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

INLINE uint16_t to_bf16(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <typename T>
void load(int64_t dtype, const char *from, int n, T *to) {
  switch (dtype) {
    case F32:
      for (int i = 0; i < n; i++) to[i] = T(((const float *)from)[i]);
      break;
    case F64:
      for (int i = 0; i < n; i++) to[i] = T(((const double *)from)[i]);
      break;
    case F16:
      for (int i = 0; i < n; i++) to[i] = T(float(((const _Float16 *)from)[i]));
      break;
    default:
      for (int i = 0; i < n; i++) to[i] = T(from_bf16(((const uint16_t *)from)[i]));
  }
  for (int i = n; i < BLOCK; i++) to[i] = T(0);
}

template <typename T>
void store(int64_t dtype, const T *from, int n, char *to) {
  switch (dtype) {
    case F32:
      for (int i = 0; i < n; i++) ((float *)to)[i] = float(from[i]);
      break;
    case F64:
      for (int i = 0; i < n; i++) ((double *)to)[i] = double(from[i]);
      break;
    case F16:
      for (int i = 0; i < n; i++) ((_Float16 *)to)[i] = _Float16(float(from[i]));
      break;
    default:
      for (int i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bf16(float(from[i]));
  }
}

// Elements of one kind of one block: where they lie if they are whole and of the compute dtype, else a copy.
template <typename T>
struct View {
  T *values;
  char *place;
  int64_t dtype;
  int n;
  bool copied;

  INLINE View(char *memory, int64_t dtype, int64_t block, int n, T *scratch)
      : place(memory + block * BLOCK * size_of(dtype)), dtype(dtype), n(n), copied(dtype != own_dtype<T>() || n != BLOCK) {
    values = copied ? scratch : (T *)place;
    if (copied) load(dtype, place, n, scratch);
  }
  // Writes what was copied; afterwards the values are as they read back.
  INLINE void write() {
    if (!copied) return;
    store(dtype, values, n, place);
    if (dtype != own_dtype<T>()) load(dtype, place, n, values);
  }
};

// Writes a block past the cache, which then need not read what is overwritten; whether it could.
template <typename T>
INLINE bool stream(const T *from, T *to) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64) return false;
  const char *source = (const char *)from;
  char *target = (char *)to;
  for (size_t i = 0; i < BLOCK * sizeof(T); i += 64)
    _mm512_stream_si512((__m512i *)(target + i), _mm512_loadu_si512(source + i));
  return true;
#else
  return false;
#endif
}

// Streamed writes are seen by other threads only after this.
INLINE void streamed() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// -- a block ------------------------------------------------------------------------------------------

template <typename T>
struct Scratch {
  alignas(64) T weight[BLOCK], grad[BLOCK], exp_avg[BLOCK], exp_avg_sq[BLOCK], model[BLOCK];
  alignas(64) char rounded[BLOCK * 8];
};

INLINE void fetch(const void *memory) { __builtin_prefetch(memory, 1, 2); }

// Where the model's weight is not what its master rounds to, somebody wrote it: it wins.
template <typename T>
void adopt_written(const Run &run, int64_t block, View<T> &w, Scratch<T> &scratch) {
  View<T> model(run.model, run.model_dtype, block, w.n, scratch.model);
  T as_rounded[BLOCK];
  store(run.model_dtype, w.values, w.n, scratch.rounded);
  load(run.model_dtype, scratch.rounded, w.n, as_rounded);
  bool written = false;
  for (int i = 0; i < w.n; i++) {
    const bool same = as_rounded[i] == model.values[i];
    written |= !same;
    w.values[i] = same ? w.values[i] : model.values[i];
  }
  if (written) w.write();
}

template <typename T>
INLINE typename Wide<T>::V direction(typename Wide<T>::V w, typename Wide<T>::V m, typename Wide<T>::V v,
                                     const Coefficients<T> &k) {
  return (m * k.unbias1) / (root(v * k.unbias2 + k.eps_inside) + k.eps_outside) + w * k.decay;
}

template <typename T>
INLINE void moments(T *w, T *g, T *m, T *v, int j, const Coefficients<T> &k) {
  const typename Wide<T>::V scaled = at(g, j) * k.grad_scale + at(w, j) * k.l2;
  at(m, j) = at(m, j) * k.beta1 + scaled * k.c1;
  at(v, j) = at(v, j) * k.beta2 + (scaled * scaled) * k.c2;
}

// Σw² and Σu² of one block, and its new moments.
template <typename T>
INLINE void first_pass(const Run &run, int64_t block, const Coefficients<T> &k, Scratch<T> &scratch, T *sums) {
  constexpr int COUNT = Wide<T>::COUNT;
  const int n = run.size(block);
  View<T> w(run.weight, run.weight_dtype, block, n, scratch.weight);
  View<T> g(run.grad, run.grad_dtype, block, n, scratch.grad);
  View<T> m(run.exp_avg, run.state_dtype, block, n, scratch.exp_avg);
  View<T> v(run.exp_avg_sq, run.state_dtype, block, n, scratch.exp_avg_sq);
  if (run.model) adopt_written(run, block, w, scratch);
  const bool no_gradient = k.grad_scale == T(0);  // 0 x nan would be nan
  if (no_gradient)
    for (int i = 0; i < BLOCK; i++) scratch.grad[i] = T(0);
  T *weight = w.values, *grad = no_gradient ? scratch.grad : g.values, *avg = m.values, *avg_sq = v.values;

  auto norms = [&](int j) __attribute__((always_inline)) {
    const auto x = at(weight, j), u = direction<T>(x, at(avg, j), at(avg_sq, j), k);
    return Pair<T>{x * x, u * u};
  };
  Pair<T> total;
  if (m.copied) {  // rounded to its dtype before it is used
    for (int j = 0; j < COUNT; j++) moments(weight, grad, avg, avg_sq, j, k);
    m.write();
    v.write();
    total = by_halving<COUNT, COUNT>(0, norms);
  } else {
    auto both = [&](int j) __attribute__((always_inline)) {
      const int ahead = j * Wide<T>::LANES + AHEAD;
      fetch(weight + ahead), fetch(grad + ahead), fetch(avg + ahead), fetch(avg_sq + ahead);
      moments(weight, grad, avg, avg_sq, j, k);
      return norms(j);
    };
    total = by_halving<COUNT, COUNT>(0, both);
  }
  sums[0] = across_lanes<T>(total.weight);
  sums[1] = across_lanes<T>(total.update);
}

template <typename T>
INLINE void second_pass(const Run &run, int64_t block, const Coefficients<T> &k, T step_size, Scratch<T> &scratch) {
  const int n = run.size(block);
  View<T> w(run.weight, run.weight_dtype, block, n, scratch.weight);
  View<T> m(run.exp_avg, run.state_dtype, block, n, scratch.exp_avg);
  View<T> v(run.exp_avg_sq, run.state_dtype, block, n, scratch.exp_avg_sq);
  T *weight = w.values, *avg = m.values, *avg_sq = v.values;
  for (int j = 0; j < Wide<T>::COUNT; j++) {
    const int ahead = j * Wide<T>::LANES + AHEAD;
    fetch(weight + ahead), fetch(avg + ahead), fetch(avg_sq + ahead);
    const auto x = at(weight, j);
    at(weight, j) = x - direction<T>(x, at(avg, j), at(avg_sq, j), k) * step_size;
  }
  if (run.model) store(run.model_dtype, weight, n, run.model + block * BLOCK * size_of(run.model_dtype));
  if (w.copied) store(run.weight_dtype, weight, n, w.place);
}

template <typename T>
INLINE T square_sum(T *values) {
  auto squares = [&](int j) __attribute__((always_inline)) {
    const auto x = at(values, j);
    return Single<T>{x * x};
  };
  return across_lanes<T>(by_halving<Wide<T>::COUNT, Wide<T>::COUNT>(0, squares).value);
}

// -- all blocks ---------------------------------------------------------------------------------------

// Calls visit(run, block, number) for this thread's equal part of the blocks of all runs.
template <typename Piece, typename Visit>
void for_each_block(const Piece *runs, int64_t count, int64_t thread, int64_t threads, Visit visit) {
  if (count == 0) return;
  const Piece &last = runs[count - 1];
  const int64_t total = last.first_block + (last.numel + BLOCK - 1) / BLOCK;
  int64_t number = total * thread / threads;
  const int64_t end = total * (thread + 1) / threads;
  int64_t low = 0, high = count;  // the run that holds the first block
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (runs[middle].first_block <= number ? low : high) = middle;
  }
  for (int64_t i = low; i < count && number < end; i++) {
    const int64_t blocks = (runs[i].numel + BLOCK - 1) / BLOCK;
    for (int64_t block = number - runs[i].first_block; block < blocks && number < end; block++, number++)
      visit(runs[i], block, number);
  }
  streamed();
}

// Runs `block_sums(run, block, number, T *sums)` on all blocks and adds its K sums of each to sums[k][parameter], in fp64
// and in block order whatever the threads: with one of them at once, else by way of `scratch` [blocks][K].
template <int K, typename T, typename Piece, typename BlockSums>
void summed(const Piece *runs, int64_t count, int64_t parameters, double *sums, T *scratch, int64_t threads,
            BlockSums block_sums) {
  if (threads == 1) {
    for_each_block(runs, count, 0, 1, [&](const Piece &run, int64_t block, int64_t number) {
      T found[K];
      block_sums(run, block, number, found);
      for (int k = 0; k < K; k++) sums[k * parameters + run.owner(block)] += double(found[k]);
    });
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t thread = 0; thread < threads; thread++)
    for_each_block(runs, count, thread, threads, [&](const Piece &run, int64_t block, int64_t number) {
      block_sums(run, block, number, scratch + number * K);
    });
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int k = 0; k < K; k++)
    for_each_block(runs, count, 0, 1, [&](const Piece &run, int64_t block, int64_t number) {
      sums[k * parameters + run.owner(block)] += double(scratch[number * K + k]);
    });
}

template <typename T>
void square_sums(const Run *runs, int64_t count, int64_t parameters, double *sums, T *scratch, int64_t threads) {
  summed<1>(runs, count, parameters, sums, scratch, threads, [&](const Run &run, int64_t block, int64_t, T *found) {
    T copy[BLOCK];
    View<T> g(run.grad, run.grad_dtype, block, run.size(block), copy);
    found[0] = square_sum(g.values);
  });
}

template <typename T>
void moments_and_norms(const Run *runs, int64_t count, const Coefficients<T> *table, int64_t parameters, double *sums,
                       T *scratch, int64_t threads) {
  summed<2>(runs, count, parameters, sums, scratch, threads, [&](const Run &run, int64_t block, int64_t, T *found) {
    Scratch<T> copies;
    first_pass<T>(run, block, table[run.owner(block)], copies, found);
  });
}

template <typename T>
void apply(const Run *runs, int64_t count, const Coefficients<T> *table, const T *step_sizes, int64_t threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t thread = 0; thread < threads; thread++)
    for_each_block(runs, count, thread, threads, [&](const Run &run, int64_t block, int64_t) {
      Scratch<T> copies;
      const int64_t owner = run.owner(block);
      second_pass<T>(run, block, table[owner], step_sizes[owner], copies);
    });
}

// A parameter's segment of a shard, and where this rank's own gradient of it lies.
struct Slice {
  const char *from;  // null: zeros
  int64_t dtype;     // of what lies there
  int64_t start;     // in the shard
  int64_t numel, param, first_block;

  int64_t owner(int64_t) const { return param; }
};

// What ranks handed over: rows of one dtype, and between them in place `own_row`, unless that is -1, the slices.
struct Parts {
  const char *rows;
  int64_t rows_count, dtype, numel, own_row;

  int64_t count() const { return rows_count + (own_row >= 0); }
  const char *row(int64_t place) const {
    return rows + (place - (own_row >= 0 && place > own_row)) * numel * size_of(dtype);
  }
};

// grad ← (Σ parts) / divisor, or grad + that, in rank order; Σ of the new squares by parameter.
template <typename T>
void average(T *grad, const Slice *slices, int64_t count, Parts parts, T divisor, bool add, int64_t parameters,
             double *sums, T *scratch, int64_t threads) {
  summed<1>(slices, count, parameters, sums, scratch, threads, [&](const Slice &slice, int64_t block, int64_t, T *found) {
    T total[BLOCK], copy[BLOCK];
    const int64_t first = block * BLOCK, left = slice.numel - first;
    const int n = left < BLOCK ? int(left) : BLOCK;
    for (int64_t row = 0; row < parts.count(); row++) {
      const bool own = row == parts.own_row;
      const int64_t dtype = own ? slice.dtype : parts.dtype;
      const char *from = own ? slice.from : parts.row(row) + slice.start * size_of(dtype);
      if (row == 0 && from) {
        load(dtype, from + first * size_of(dtype), n, total);
      } else if (row == 0) {
        for (int i = 0; i < BLOCK; i++) total[i] = T(0);
      } else if (from) {
        const View<T> next(const_cast<char *>(from), dtype, block, n, copy);
        for (int i = 0; i < BLOCK; i++) total[i] += next.values[i];
      } else {
        for (int i = 0; i < BLOCK; i++) total[i] += T(0);  // of -0 it makes 0, as a sum of tensors does
      }
    }
    if (divisor != T(1))
      for (int i = 0; i < BLOCK; i++) total[i] /= divisor;
    T *to = grad + slice.start + first;
    if (add)
      for (int i = 0; i < n; i++) total[i] = to[i] + total[i];
    if (add || n < BLOCK || !stream(total, to)) std::memcpy(to, total, n * sizeof(T));
    found[0] = square_sum(total);
  });
}

}  // namespace

// -- what ctypes sees ---------------------------------------------------------------------------------

extern "C" {

// Bytes of what Python lays out.
int64_t lamb_run_bytes() { return sizeof(Run); }
int64_t lamb_slice_bytes() { return sizeof(Slice); }
int64_t lamb_coefficients_bytes() { return sizeof(Coefficients<float>); }

#define LAMB_FUNCTIONS(T, SUFFIX)                                                                                      \
  void lamb_square_sums_##SUFFIX(const Run *runs, int64_t count, int64_t parameters, double *sums, T *scratch,        \
                                 int64_t threads) {                                                                   \
    square_sums<T>(runs, count, parameters, sums, scratch, threads);                                                  \
  }                                                                                                                   \
  void lamb_moments_and_norms_##SUFFIX(const Run *runs, int64_t count, const void *table, int64_t parameters,         \
                                       double *sums, T *scratch, int64_t threads) {                                   \
    moments_and_norms<T>(runs, count, (const Coefficients<T> *)table, parameters, sums, scratch, threads);            \
  }                                                                                                                   \
  void lamb_apply_##SUFFIX(const Run *runs, int64_t count, const void *table, const T *step_sizes, int64_t threads) { \
    apply<T>(runs, count, (const Coefficients<T> *)table, step_sizes, threads);                                       \
  }                                                                                                                   \
  void lamb_average_##SUFFIX(T *grad, const Slice *slices, int64_t count, const char *rows, int64_t row_count,        \
                             int64_t dtype, int64_t numel, int64_t own_row, int64_t divisor, int64_t add,             \
                             int64_t parameters, double *sums, T *scratch, int64_t threads) {                         \
    average<T>(grad, slices, count, Parts{rows, row_count, dtype, numel, own_row}, T(divisor), add, parameters, sums, \
               scratch, threads);                                                                                     \
  }

LAMB_FUNCTIONS(float, f32)
LAMB_FUNCTIONS(double, f64)
}
