// The two passes of LAMB over a rank's memory: reference.py's IEEE operations in reference.py's order, so results have
// the same bits on any number of threads. Compile with -ffp-contract=off: a fused multiply-add rounds once less.
//
// A plain C interface for ctypes: it needs no headers of Python or torch and does not depend on their versions.

#include "blocks.h"

namespace {

constexpr int AHEAD = 2 * BLOCK;  // prefetch distance in elements: a page ends every fourth block

// A contiguous range of memory; blocks start at its first element, and the last one may be short.
struct Run {
  char *weight, *model, *grad, *exp_avg, *exp_avg_sq;
  const int64_t *block_param;  // [blocks] the parameter of each block; null: `param` for all
  int64_t numel, param;
  int64_t first_block;  // number of blocks in the runs before
  int64_t weight_dtype, model_dtype, grad_dtype, state_dtype;

  bool uses_remainders() const { return weight_dtype == REMAINDER; }
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

// -- a block ------------------------------------------------------------------------------------------

template <typename T>
struct Scratch {
  alignas(64) T weight[BLOCK], grad[BLOCK], exp_avg[BLOCK], exp_avg_sq[BLOCK], model[BLOCK];
  alignas(64) char rounded[BLOCK * 8];
};

INLINE void fetch(const void *memory) { __builtin_prefetch(memory, 1, 2); }

// The masters of a block: stored as such, or joined from weights and remainders.
template <typename T>
INLINE View<T> masters(const Run &run, int64_t block, int n, T *scratch) {
  if (!run.uses_remainders()) return View<T>(run.weight, run.weight_dtype, block, n, scratch);
  char *place = run.weight + block * BLOCK * sizeof(int16_t);
  join((const uint16_t *)run.model + block * BLOCK, (const int16_t *)place, n, scratch);
  return View<T>(place, REMAINDER, n, scratch);
}

// Stores masters, and the model's weights if masters are separate.
template <typename T>
INLINE void store_masters(const Run &run, int64_t block, const View<T> &w) {
  char *model = run.model + block * BLOCK * size_of(run.model_dtype);
  if (run.uses_remainders()) {
    split(w.values, w.n, (uint16_t *)model, (int16_t *)w.place);
    return;
  }
  if (run.model) store(run.model_dtype, w.values, w.n, model);
  if (w.copied) store(w.dtype, w.values, w.n, w.place);
}

// A weight that its master no longer rounds to was written by the user: it replaces the master.
template <typename T>
void resync_masters(const Run &run, int64_t block, View<T> &w, Scratch<T> &scratch) {
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

// Pass 1 of one block: updates moments, computes Σw² and Σu².
template <typename T>
INLINE void first_pass(const Run &run, int64_t block, const Coefficients<T> &k, Scratch<T> &scratch, T *sums) {
  constexpr int COUNT = Wide<T>::COUNT;
  const int n = run.size(block);
  View<T> w = masters(run, block, n, scratch.weight);
  View<T> g(run.grad, run.grad_dtype, block, n, scratch.grad);
  View<T> m(run.exp_avg, run.state_dtype, block, n, scratch.exp_avg);
  View<T> v(run.exp_avg_sq, run.state_dtype, block, n, scratch.exp_avg_sq);
  if (run.model && !run.uses_remainders()) resync_masters(run, block, w, scratch);
  const bool no_gradient = k.grad_scale == T(0);  // 0 x nan would be nan
  if (no_gradient)
    for (int i = 0; i < BLOCK; i++) scratch.grad[i] = T(0);
  T *weight = w.values, *grad = no_gradient ? scratch.grad : g.values, *avg = m.values, *avg_sq = v.values;

  auto norms = [&](int j) __attribute__((always_inline)) {
    const auto x = at(weight, j), u = direction<T>(x, at(avg, j), at(avg_sq, j), k);
    return Pair<T>{x * x, u * u};
  };
  Pair<T> total;
  if (m.copied) {  // moments are rounded to their dtype before use
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
  View<T> w = masters(run, block, n, scratch.weight);
  View<T> m(run.exp_avg, run.state_dtype, block, n, scratch.exp_avg);
  View<T> v(run.exp_avg_sq, run.state_dtype, block, n, scratch.exp_avg_sq);
  T *weight = w.values, *avg = m.values, *avg_sq = v.values;
  for (int j = 0; j < Wide<T>::COUNT; j++) {
    const int ahead = j * Wide<T>::LANES + AHEAD;
    fetch(weight + ahead), fetch(avg + ahead), fetch(avg_sq + ahead);
    const auto x = at(weight, j);
    at(weight, j) = x - direction<T>(x, at(avg, j), at(avg_sq, j), k) * step_size;
  }
  store_masters(run, block, w);
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

// Calls visit(run, block, number) for this thread's equal share of the blocks of all runs.
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

// Calls `block_sums(run, block, number, T *sums)` on all blocks and adds each block's K sums to sums[k][parameter], in
// fp64 and in block order for any number of threads: directly with one thread, else through `scratch` [blocks][K].
template <int K, typename T, typename Piece, typename BlockSums>
void summed(const Piece *runs, int64_t count, int64_t parameters, double *sums, T *scratch, int64_t threads,
            BlockSums block_sums) {
  if (threads == 1) {
    for_each_block(runs, count, 0, 1, [&](const Piece &run, int64_t block, int64_t number) {
      T of_block[K];
      block_sums(run, block, number, of_block);
      for (int k = 0; k < K; k++) sums[k * parameters + run.owner(block)] += double(of_block[k]);
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
  summed<1>(runs, count, parameters, sums, scratch, threads, [&](const Run &run, int64_t block, int64_t, T *out) {
    T copy[BLOCK];
    View<T> g(run.grad, run.grad_dtype, block, run.size(block), copy);
    out[0] = square_sum(g.values);
  });
}

template <typename T>
void moments_and_norms(const Run *runs, int64_t count, const Coefficients<T> *table, int64_t parameters, double *sums,
                       T *scratch, int64_t threads) {
  summed<2>(runs, count, parameters, sums, scratch, threads, [&](const Run &run, int64_t block, int64_t, T *out) {
    Scratch<T> copies;
    first_pass<T>(run, block, table[run.owner(block)], copies, out);
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

// A parameter's segment of a shard, and the address of this rank's own gradient of it.
struct Slice {
  const char *from;  // null: zeros
  int64_t dtype;     // of the gradient
  int64_t start;     // in the shard
  int64_t numel, param, first_block;

  int64_t owner(int64_t) const { return param; }
};

// Received parts: rows of one dtype; the slices are row `own_row` among them, unless it is -1.
struct Parts {
  const char *rows;
  int64_t rows_count, dtype, numel, own_row;

  int64_t count() const { return rows_count + (own_row >= 0); }
  const char *row(int64_t place) const {
    return rows + (place - (own_row >= 0 && place > own_row)) * numel * size_of(dtype);
  }
};

// grad ← (Σ parts) / divisor, or grad + that, in rank order; adds Σg² by parameter.
template <typename T>
void average(T *grad, const Slice *slices, int64_t count, Parts parts, T divisor, bool add, int64_t parameters,
             double *sums, T *scratch, int64_t threads) {
  summed<1>(slices, count, parameters, sums, scratch, threads, [&](const Slice &slice, int64_t block, int64_t, T *out) {
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
        for (int i = 0; i < BLOCK; i++) total[i] += T(0);  // -0 + 0 is 0, as in a sum of tensors
      }
    }
    if (divisor != T(1))
      for (int i = 0; i < BLOCK; i++) total[i] /= divisor;
    T *to = grad + slice.start + first;
    if (add)
      for (int i = 0; i < n; i++) total[i] = to[i] + total[i];
    if (add || n < BLOCK || !stream(total, to)) std::memcpy(to, total, n * sizeof(T));
    out[0] = square_sum(total);
  });
}

}  // namespace

// -- C interface --------------------------------------------------------------------------------------

extern "C" {

// Sizes of the structs that Python fills, to compare.
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
