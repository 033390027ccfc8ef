// The two passes of LAMB over a rank's memory: reference.py's IEEE operations in reference.py's order, so results have
// the same bits on any number of threads. Compile with -ffp-contract=off: a fused multiply-add rounds once less.
//
// Memory is visited in its order and not prefetched by hand: processors follow streams, and fetching lines for writing
// (gradients are only read) costs more than it brings.
//
// A plain C interface for ctypes: it needs no headers of Python or torch and does not depend on their versions.

#include "runs.h"

namespace {

template <typename T>
struct Coefficients {  // rule.Coefficients, a row of rule.table
  T grad_scale, l2, beta1, c1, beta2, c2, unbias1, unbias2, eps_inside, eps_outside, decay, opposed, salt;
};

// `D` of the functions below is the number of sums beside Σw²: of each direction's Σu², or with caution Σu², Σu w and Σμ.
constexpr int CAUTION = 3;
constexpr int FLUSH_STEPS = 64;  // rule.FLUSH_STEPS
constexpr int directions(int D) { return D == CAUTION ? 1 : D; }

template <typename T, typename V = typename Wide<T>::V>
INLINE V denominator(V v, const Coefficients<T> &k) {
  return root(v * k.unbias2 + k.eps_inside) + k.eps_outside;
}

// The gradient times its scale, plus l2 w.
template <typename T, typename V = typename Wide<T>::V>
INLINE V scaled_gradient(const T *grads, V w, const Coefficients<T> &k, int j) {
  return at<T, Wide<T>::LANES>(grads, j) * k.grad_scale + w * k.l2;
}

// μ: 1 where the update and the gradient agree in sign, else k.opposed.
template <typename T, typename V = typename Wide<T>::V>
INLINE V agreement(V update, V scaled, const Coefficients<T> &k) {
  return update * scaled > V{} ? V{} + T(1) : V{} + k.opposed;
}

// What one vector of pass 1 adds to Σw² and D more sums.
template <typename T, int D, typename V = typename Wide<T>::V>
INLINE Sums<T, 1 + D> terms(V w, V scaled, V m, V v, const Coefficients<T> &k) {
  const V below = denominator<T>(v, k), decayed = w * k.decay, adaptive = (m * k.unbias1) / below;
  if constexpr (D == CAUTION) {
    const V mask = agreement<T>(adaptive, scaled, k), u = adaptive * mask + decayed;
    return {{w * w, u * u, u * w, mask}};
  } else if constexpr (D == 2) {
    const V u = adaptive + decayed, along = scaled / below + decayed;
    return {{w * w, u * u, along * along}};
  } else {
    const V u = adaptive + decayed;
    return {{w * w, u * u}};
  }
}

// rule.flush_subnormals of a block's moments.
template <typename T, typename... Moments>
INLINE void flush_subnormals(const Coefficients<T> &k, Moments... moments) {
  if (int64_t(k.salt) % FLUSH_STEPS) return;
  vectors<T>([&](int j) __attribute__((always_inline)) { (put(flushed<T>(at<T, Wide<T>::LANES>(moments, j)), moments, j), ...); });
}

// Pass 1 of one block: updates moments, computes Σw² and D more sums.
template <typename T, int D>
INLINE void first_pass(const Places &places, const Coefficients<T> k, T *sums) {
  typedef typename Wide<T>::V V;
  constexpr int LANES = Wide<T>::LANES, COUNT = Wide<T>::COUNT;
  alignas(64) T copies[4][BLOCK];
  T *w = masters(places, copies[0]), *m = moments<T, true>(places.exp_avg, copies[1]),
    *v = moments<T, false>(places.exp_avg_sq, copies[2]);
  const T *g = gradients(places.grad, k.grad_scale, copies[3]);
  resync(w, places);
  flush_subnormals(k, m, v);
  auto update = [&](V scaled, int j) __attribute__((always_inline)) {
    put(at<T, LANES>(m, j) * k.beta1 + scaled * k.c1, m, j);
    put(at<T, LANES>(v, j) * k.beta2 + (scaled * scaled) * k.c2, v, j);
  };
  auto pass = [&](auto with) __attribute__((always_inline)) {
    return by_halving<COUNT>([&](int j) __attribute__((always_inline)) {
      const V weight = at<T, LANES>(w, j), scaled = scaled_gradient(g, weight, k, j);
      with(scaled, j);
      return terms<T, D>(weight, scaled, at<T, LANES>(m, j), at<T, LANES>(v, j), k);
    });
  };
  Sums<T, 1 + D> total;
  if (in_place<T>(places.exp_avg)) {
    total = pass(update);
  } else {
    vectors<T>([&](int j) __attribute__((always_inline)) { update(scaled_gradient(g, at<T, LANES>(w, j), k, j), j); });
    store_moments<T, true>(m, v, places, k.salt);
    total = pass([](V, int) __attribute__((always_inline)) {});
  }
  for (int i = 0; i < 1 + D; i++) sums[i] = across_lanes<T>(total.of[i]);
  write_back(places.n, places.weight, places.exp_avg, places.exp_avg_sq);
}

// Pass 2 of one block; `step_sizes`: of each direction.
template <typename T, int D>
INLINE void second_pass(const Places &places, const Coefficients<T> k, const T *step_sizes) {
  typedef typename Wide<T>::V V;
  constexpr int LANES = Wide<T>::LANES;
  alignas(64) T copies[4][BLOCK];
  T *w = masters(places, copies[0]);
  const T *m = moments<T, true>(places.exp_avg, copies[1]), *v = moments<T, false>(places.exp_avg_sq, copies[2]);
  const T *g = D == 1 ? nullptr : gradients(places.grad, k.grad_scale, copies[3]);
  for (int j = 0; j < Wide<T>::COUNT; j++) {
    const V weight = at<T, LANES>(w, j), below = denominator<T>(at<T, LANES>(v, j), k), decayed = weight * k.decay;
    V adaptive = (at<T, LANES>(m, j) * k.unbias1) / below;
    if constexpr (D == CAUTION) adaptive *= agreement<T>(adaptive, scaled_gradient(g, weight, k, j), k);
    V next = weight - (adaptive + decayed) * step_sizes[0];
    if constexpr (D == 2) next = next - (scaled_gradient(g, weight, k, j) / below + decayed) * step_sizes[1];
    put(next, w, j);
  }
  store_masters(w, places);
  write_back(places.n, places.weight, places.model);
}

// LARS's pass 1 of one block: Σw².
template <typename T>
INLINE T weight_norm(const Places &places) {
  alignas(64) T copy[BLOCK];
  T *w = masters(places, copy);
  resync(w, places);
  write_back(places.n, places.weight);
  return across_lanes<T>(by_halving<Wide<T>::COUNT>([&](int j) __attribute__((always_inline)) {
    const auto x = at<T, Wide<T>::LANES>(w, j);
    return x * x;
  }));
}

// LARS's pass 2 of one block; `step_sizes`: of the momentum, and of what enters it.
template <typename T>
INLINE void momentum_pass(const Places &places, const Coefficients<T> k, const T *step_sizes) {
  typedef typename Wide<T>::V V;
  constexpr int LANES = Wide<T>::LANES;
  alignas(64) T copies[3][BLOCK];
  T *w = masters(places, copies[0]), *m = moments<T, true>(places.exp_avg, copies[1]);
  const T *g = gradients(places.grad, k.grad_scale, copies[2]);
  flush_subnormals(k, m);
  auto update = [&](V scaled, int j) __attribute__((always_inline)) {
    put(at<T, LANES>(m, j) * k.beta1 + scaled * k.c1, m, j);
  };
  auto pass = [&](auto with) __attribute__((always_inline)) {
    for (int j = 0; j < Wide<T>::COUNT; j++) {
      const V weight = at<T, LANES>(w, j), scaled = scaled_gradient(g, weight, k, j);
      with(scaled, j);
      put((weight - at<T, LANES>(m, j) * step_sizes[0]) - scaled * step_sizes[1], w, j);
    }
  };
  if (in_place<T>(places.exp_avg)) {
    pass(update);
  } else {
    vectors<T>([&](int j) __attribute__((always_inline)) { update(scaled_gradient(g, at<T, LANES>(w, j), k, j), j); });
    store_moments<T, false>(m, nullptr, places, k.salt);
    pass([](V, int) __attribute__((always_inline)) {});
  }
  store_masters(w, places);
  write_back(places.n, places.weight, places.model, places.exp_avg);
}

// -- all blocks ---------------------------------------------------------------------------------------

// Calls visit(run, first, end, number) on this thread's equal share of the blocks of all runs: blocks [first, end) of a
// run, of which the first is block `number` of all.
template <typename Piece, typename Visit>
INLINE void for_each_run(const Piece *runs, int64_t count, int64_t thread, int64_t threads, Visit visit) {
  if (count == 0) return;
  const Piece &last = runs[count - 1];
  const int64_t total = last.first_block + (last.numel + BLOCK - 1) / BLOCK;
  int64_t number = total * thread / threads;
  const int64_t stop = total * (thread + 1) / threads;
  int64_t low = 0, high = count;  // the run that holds the first block
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (runs[middle].first_block <= number ? low : high) = middle;
  }
  for (int64_t i = low; i < count && number < stop; i++) {
    const int64_t blocks = (runs[i].numel + BLOCK - 1) / BLOCK, first = number - runs[i].first_block;
    const int64_t end = blocks - first < stop - number ? blocks : first + stop - number;
    visit(runs[i], first, end, number);
    number += end - first;
  }
  streamed();
}

// Calls block_sums(run, first, end, of_blocks), which writes [end - first][K] sums, on all blocks. Adds each block's to
// sums[k][parameter], in fp64 and in block order for any number of threads: some blocks at a time with one thread, else
// through `of_blocks` [blocks][K].
template <int K, typename T, typename Piece, typename BlockSums>
INLINE void summed(const Piece *runs, int64_t count, int64_t parameters, double *sums, T *of_blocks, int64_t threads,
                   BlockSums block_sums) {
  auto add = [&](int k, const Piece &run, int64_t first, int64_t end, const T *of_some) {
    for (int64_t block = first; block < end; block++)
      sums[k * parameters + run.owner(block)] += double(of_some[(block - first) * K + k]);
  };
  if (threads == 1) {
    for_each_run(runs, count, 0, 1, [&](const Piece &run, int64_t first, int64_t end, int64_t) {
      constexpr int64_t SOME = 256;
      T of_some[SOME * K];
      for (int64_t block = first; block < end; block += SOME) {
        const int64_t stop = block + SOME < end ? block + SOME : end;
        block_sums(run, block, stop, of_some);
        for (int k = 0; k < K; k++) add(k, run, block, stop, of_some);
      }
    });
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t thread = 0; thread < threads; thread++)
    for_each_run(runs, count, thread, threads, [&](const Piece &run, int64_t first, int64_t end, int64_t number) {
      block_sums(run, first, end, of_blocks + number * K);
    });
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int k = 0; k < K; k++)
    for_each_run(runs, count, 0, 1, [&](const Piece &run, int64_t first, int64_t end, int64_t number) {
      add(k, run, first, end, of_blocks + number * K);
    });
}

template <typename T>
void square_sums(const Run *runs, int64_t count, int64_t parameters, double *sums, T *of_blocks, int64_t threads) {
  summed<1>(runs, count, parameters, sums, of_blocks, threads, [&](const Run &run, int64_t first, int64_t end, T *out) OUTLINE {
    Copy copy;
    with_known(run.grad_dtype, [&](auto dtype) __attribute__((always_inline)) {
      for (int64_t block = first; block < end; block++) {
        const Place g(Kind(run.grad, dtype), block, size_of_block(run.numel, block), copy);
        out[block - first] = across_lanes<T>(by_halving<Wide<T>::COUNT>([&](int j) __attribute__((always_inline)) {
          const auto x = load<T>(dtype, g.block, j);
          return x * x;
        }));
      }
    });
  });
}

template <typename T, int D>
void moments_and_norms(const Run *runs, int64_t count, const Coefficients<T> *table, int64_t parameters, double *sums,
                       T *of_blocks, int64_t threads) {
  constexpr int K = 1 + D;
  summed<K>(runs, count, parameters, sums, of_blocks, threads, [&](const Run &run, int64_t first, int64_t end, T *out) OUTLINE {
    const Kinds kinds(run);
    for (int64_t block = first; block < end; block++) {
      const Places places(kinds, block);
      first_pass<T, D>(places, table[run.owner(block)], out + K * (block - first));
    }
  });
}

template <typename T>
void weight_norms(const Run *runs, int64_t count, int64_t parameters, double *sums, T *of_blocks, int64_t threads) {
  summed<1>(runs, count, parameters, sums, of_blocks, threads, [&](const Run &run, int64_t first, int64_t end, T *out) OUTLINE {
    const Kinds kinds(run);
    for (int64_t block = first; block < end; block++) {
      const Places places(kinds, block);
      out[block - first] = weight_norm<T>(places);
    }
  });
}

// Calls visit(places, layer) on all blocks, each by one thread.
template <typename Visit>
INLINE void for_each_block(const Run *runs, int64_t count, int64_t threads, Visit visit) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t thread = 0; thread < threads; thread++)
    for_each_run(runs, count, thread, threads, [&](const Run &run, int64_t first, int64_t end, int64_t) {
      const Kinds kinds(run);
      for (int64_t block = first; block < end; block++) {
        const Places places(kinds, block);
        visit(places, run.owner(block));
        }
    });
}

template <typename T>
void apply_momentum(const Run *runs, int64_t count, const Coefficients<T> *table, int64_t parameters, const T *step_sizes,
                    int64_t threads) {
  for_each_block(runs, count, threads, [&](const Places &places, int64_t owner) __attribute__((always_inline)) {
    const T sizes[2] = {step_sizes[owner], step_sizes[parameters + owner]};
    momentum_pass<T>(places, table[owner], sizes);
  });
}

template <typename T, int D>
void apply(const Run *runs, int64_t count, const Coefficients<T> *table, int64_t parameters, const T *step_sizes,
           int64_t threads) {
  for_each_block(runs, count, threads, [&](const Places &places, int64_t owner) __attribute__((always_inline)) {
    T sizes[directions(D)];
    for (int i = 0; i < directions(D); i++) sizes[i] = step_sizes[i * parameters + owner];
    second_pass<T, D>(places, table[owner], sizes);
  });
}

// A parameter's segment of a shard, and the address of this rank's own gradient of it.
struct Slice {
  char *from;     // null: zeros
  int64_t dtype;  // of the gradient
  int64_t start;  // in the shard
  int64_t numel, param, first_block;

  int64_t owner(int64_t) const { return param; }
};

// Received parts: rows of one dtype; the slices are row `own_row` among them, unless it is -1.
struct Parts {
  char *rows;
  int64_t rows_count, dtype, numel, own_row;

  int64_t count() const { return rows_count + (own_row >= 0); }
  char *row(int64_t place) const {
    return rows + (place - (own_row >= 0 && place > own_row)) * numel * size_of(dtype);
  }
};

alignas(64) char ZEROS[BLOCK * 4];

// One block of `average`.
template <typename T>
INLINE T averaged(T *grad, const Slice &slice, int64_t block, const Parts &parts, T divisor, bool add) {
  typedef typename Wide<T>::V V;
  constexpr int COUNT = Wide<T>::COUNT;
  alignas(64) T total[BLOCK];
  const T *before = total;  // the sum of rows before
  Copy copy, first_copy, part_copy;
  const int n = size_of_block(slice.numel, block);
  const Place to(Kind((char *)(grad + slice.start), own_dtype<T>()), block, n, copy);
  const bool past_cache = n == BLOCK && !add && reinterpret_cast<uintptr_t>(to.block) % WIDTH == 0;
  const int64_t last = parts.count() - 1;
  T square_sum = 0;
  for (int64_t row = 0; row <= last; row++) {
    const bool own = row == parts.own_row, zeros = own && !slice.from;  // x + 0, as in a sum of tensors: -0 becomes 0
    char *start = zeros ? ZEROS : own ? slice.from : parts.row(row) + slice.start * size_of(parts.dtype);
    const int64_t dtype = zeros ? F32 : own ? slice.dtype : parts.dtype;
    const Place part(Kind(start, dtype), zeros ? 0 : block, n, row == 0 ? first_copy : part_copy);
    if (row == 0 && last > 0) {
      before = values(part, total);
      continue;
    }
    with_known(dtype, [&](auto known) __attribute__((always_inline)) {
      auto sum = [&](int j) __attribute__((always_inline)) {
        const V next = load<T>(known, part.block, j);
        return row == 0 ? next : at<T, Wide<T>::LANES>(before, j) + next;
      };
      if (row < last) {
        before = filled(total, sum);
        return;
      }
      square_sum = across_lanes<T>(by_halving<COUNT>([&](int j) __attribute__((always_inline)) {
        V x = sum(j);
        if (divisor != T(1)) x /= divisor;
        if (add) x = at<T, Wide<T>::LANES>(to.block, j) + x;
        if (past_cache)
          stream(x, (T *)to.block, j);
        else
          put(x, to.block, j);
        return x * x;
      }));
    });
  }
  write_back(n, to);
  return square_sum;
}

// grad ← (Σ parts) / divisor, or grad + that, in rank order; adds Σg² by parameter.
template <typename T>
void average(T *grad, const Slice *slices, int64_t count, Parts parts, T divisor, bool add, int64_t parameters,
             double *sums, T *of_blocks, int64_t threads) {
  summed<1>(slices, count, parameters, sums, of_blocks, threads, [&](const Slice &slice, int64_t first, int64_t end, T *out) OUTLINE {
    for (int64_t block = first; block < end; block++) out[block - first] = averaged(grad, slice, block, parts, divisor, add);
  });
}

}  // namespace

// -- C interface --------------------------------------------------------------------------------------

extern "C" {

// Sizes of the structs that Python fills, to compare.
int64_t lamb_run_bytes() { return sizeof(Run); }
int64_t lamb_slice_bytes() { return sizeof(Slice); }
int64_t lamb_coefficients_bytes() { return sizeof(Coefficients<float>); }

// `update`: 1 or 2 directions, or CAUTION. `of_blocks`: with several threads, memory for [blocks] sums,
// [blocks][1 + update] in moments_and_norms.
#define LAMB_FUNCTIONS(T, SUFFIX)                                                                                      \
  void lamb_square_sums_##SUFFIX(const Run *runs, int64_t count, int64_t parameters, double *sums, T *of_blocks,      \
                                 int64_t threads) {                                                                   \
    square_sums<T>(runs, count, parameters, sums, of_blocks, threads);                                                \
  }                                                                                                                   \
  void lamb_moments_and_norms_##SUFFIX(const Run *runs, int64_t count, int64_t update, const void *table,             \
                                       int64_t parameters, double *sums, T *of_blocks, int64_t threads) {             \
    (update == 1 ? moments_and_norms<T, 1> : update == 2 ? moments_and_norms<T, 2> : moments_and_norms<T, CAUTION>)(  \
        runs, count, (const Coefficients<T> *)table, parameters, sums, of_blocks, threads);                           \
  }                                                                                                                   \
  void lamb_apply_##SUFFIX(const Run *runs, int64_t count, int64_t update, const void *table, int64_t parameters,     \
                           const T *step_sizes, int64_t threads) {                                                    \
    (update == 1 ? apply<T, 1> : update == 2 ? apply<T, 2> : apply<T, CAUTION>)(                                      \
        runs, count, (const Coefficients<T> *)table, parameters, step_sizes, threads);                                \
  }                                                                                                                   \
  void lamb_weight_norms_##SUFFIX(const Run *runs, int64_t count, int64_t parameters, double *sums, T *of_blocks,      \
                                  int64_t threads) {                                                                  \
    weight_norms<T>(runs, count, parameters, sums, of_blocks, threads);                                               \
  }                                                                                                                   \
  void lamb_apply_momentum_##SUFFIX(const Run *runs, int64_t count, const void *table, int64_t parameters,            \
                                    const T *step_sizes, int64_t threads) {                                           \
    apply_momentum<T>(runs, count, (const Coefficients<T> *)table, parameters, step_sizes, threads);                  \
  }                                                                                                                   \
  void lamb_average_##SUFFIX(T *grad, const Slice *slices, int64_t count, char *rows, int64_t row_count,              \
                             int64_t dtype, int64_t numel, int64_t own_row, int64_t divisor, int64_t add,             \
                             int64_t parameters, double *sums, T *of_blocks, int64_t threads) {                       \
    average<T>(grad, slices, count, Parts{rows, row_count, dtype, numel, own_row}, T(divisor), add, parameters, sums, \
               of_blocks, threads);                                                                                   \
  }

LAMB_FUNCTIONS(float, f32)
LAMB_FUNCTIONS(double, f64)
}
