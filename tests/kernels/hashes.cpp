// Runs the C interface of lamb.cpp over memory from a fixed generator of integers, and prints hashes of all memory that
// it wrote: a line a case, equal on every architecture. Values are finite; NaNs have other bits on other processors.
// structs.h: native.py's RUN and SLICE, and its numbers (drivers.py writes it).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "structs.h"

extern "C" {
#define DECLARE(T, SUFFIX)                                                                                             \
  void lamb_square_sums_##SUFFIX(const Run *, int64_t, int64_t, double *, T *, int64_t);                               \
  void lamb_moments_and_norms_##SUFFIX(const Run *, int64_t, int64_t, const void *, int64_t, double *, T *, int64_t);  \
  void lamb_apply_##SUFFIX(const Run *, int64_t, int64_t, const void *, int64_t, const T *, int64_t);                  \
  void lamb_average_##SUFFIX(T *, const Slice *, int64_t, char *, int64_t, int64_t, int64_t, int64_t, int64_t,         \
                             int64_t, int64_t, double *, T *, int64_t);
DECLARE(float, f32)
DECLARE(double, f64)
}

template <typename T>
struct Library;
#define DEFINE(T, SUFFIX)                                                      \
  template <>                                                                  \
  struct Library<T> {                                                          \
    static constexpr const char *name = #SUFFIX;                               \
    static constexpr auto square_sums = lamb_square_sums_##SUFFIX;             \
    static constexpr auto moments_and_norms = lamb_moments_and_norms_##SUFFIX; \
    static constexpr auto apply = lamb_apply_##SUFFIX;                         \
    static constexpr auto average = lamb_average_##SUFFIX;                     \
  };
DEFINE(float, f32)
DEFINE(double, f64)

uint64_t state = 1;

uint64_t number() {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t size_of(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : dtype == REMAINDER8 ? 1 : 2; }

// The bits of a number: of 16 magnitudes, of one sign if `positive`; one in 32 is 0 or subnormal.
uint64_t bits(int64_t dtype, bool positive) {
  if (dtype == REMAINDER) return number() & 0xffff;
  if (dtype == REMAINDER8) return number() & 0xff;
  const int exponent_bits = dtype == F64 ? 11 : dtype == F16 ? 5 : 8;
  const int mantissa_bits = dtype == F64 ? 52 : dtype == F32 ? 23 : dtype == F16 ? 10 : 7;
  const uint64_t bias = (1u << (exponent_bits - 1)) - 1;
  const uint64_t mantissa = number() & ((uint64_t(1) << mantissa_bits) - 1);
  const uint64_t kind = number() % 32, exponent = kind == 0 ? 0 : bias - 12 + number() % 16;
  const uint64_t sign = positive ? 0 : number() & 1;
  return sign << (exponent_bits + mantissa_bits) | exponent << mantissa_bits | (kind == 0 && mantissa & 1 ? 0 : mantissa);
}

// `count` elements of which blocks may be short, `offset` elements behind an aligned address.
struct Memory {
  std::vector<uint64_t> words;
  int64_t dtype, offset, count;

  Memory(int64_t dtype, int64_t count, int64_t offset)
      : words((count + offset) * size_of(dtype) / 8 + 128), dtype(dtype), offset(offset), count(count) {}
  char *start() const {
    const uintptr_t base = ((uintptr_t)words.data() + 63) / 64 * 64;
    return (char *)base + offset * size_of(dtype);
  }
  void set(int64_t i, uint64_t value) { std::memcpy(start() + i * size_of(dtype), &value, size_of(dtype)); }  // little-endian
  // A number for each element below `inside`, where `chance` in 16.
  void fill(int64_t from, int64_t inside, bool positive, int chance) {
    for (int64_t i = from; i < inside; i++)
      if (int(number() % 16) < chance) set(i, bits(dtype, positive));
  }
  std::string hash() const {
    uint64_t h = 0xcbf29ce484222325u;  // FNV-1a over words; the last one holds zeros behind the end
    for (int64_t i = 0; i < count * size_of(dtype); i += 8) {
      uint64_t word;
      std::memcpy(&word, start() + i, 8);
      h = (h ^ word) * 0x100000001b3u;
      h ^= h >> 32;
    }
    char text[24];
    std::snprintf(text, sizeof(text), " %016llx", (unsigned long long)h);
    return text;
  }
};

const std::vector<int64_t> LENGTHS = {700, 1, 256, 1300, 255, 257};
const int64_t PARAMETERS = LENGTHS.size();

int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

template <typename T>
std::vector<T> fractions(int64_t count, int zeros_every) {
  std::vector<T> values(count);
  for (int64_t i = 0; i < count; i++) values[i] = i % zeros_every == 0 ? T(0) : T(64 + number() % 256) / T(256);
  return values;
}

std::string hash_of(const std::vector<double> &sums) {
  for (const double sum : sums)
    if (!(sum - sum == 0)) std::exit(1);  // not finite
  Memory copy(F64, sums.size(), 0);
  std::memcpy(copy.start(), sums.data(), sums.size() * 8);
  return copy.hash();
}

// Steps of every kind; between them the user writes into the model's weights.
template <typename T>
void two_steps(bool flat, int64_t weight, int64_t model, int64_t grad, int64_t moment, int64_t threads) {
  typedef Library<T> Lib;
  state = 1;
  std::vector<Run> runs;
  std::vector<Memory> memory[5];
  std::vector<int64_t> owners;
  const int64_t dtypes[5] = {weight, model, grad, moment, moment};
  int64_t blocks = 0;
  for (const int64_t length : LENGTHS) blocks += blocks_of(length);
  const int64_t parts = flat ? 1 : PARAMETERS;
  for (int64_t part = 0; part < parts; part++)
    for (int kind = 0; kind < 5; kind++)
      memory[kind].emplace_back(dtypes[kind] == NONE ? F32 : dtypes[kind], flat ? blocks * BLOCK : LENGTHS[part],
                                flat ? 0 : part + 1);
  int64_t block = 0;
  for (int64_t p = 0; p < PARAMETERS; p++) {
    const int64_t start = flat ? block * BLOCK : 0;
    for (int kind = 0; kind < 5; kind++)
      memory[kind][flat ? 0 : p].fill(start, start + LENGTHS[p], kind == 4, 16);
    for (int64_t i = 0; i < blocks_of(LENGTHS[p]); i++, block++) owners.push_back(p);
  }
  block = 0;
  for (int64_t part = 0; part < parts; part++) {
    Run run;
    run.weight = (int64_t)memory[0][part].start();
    run.model = model == NONE ? 0 : (int64_t)memory[1][part].start();
    run.grad = (int64_t)memory[2][part].start();
    run.exp_avg = (int64_t)memory[3][part].start();
    run.exp_avg_sq = (int64_t)memory[4][part].start();
    run.block_param = flat ? (int64_t)owners.data() : 0;
    run.numel = memory[0][part].count;
    run.param = flat ? 0 : part;
    run.first_block = block;
    run.weight_dtype = weight, run.model_dtype = model, run.grad_dtype = grad, run.state_dtype = moment;
    block += blocks_of(run.numel);
    runs.push_back(run);
  }
  const std::vector<T> table = fractions<T>(PARAMETERS * COLUMNS, 4 * COLUMNS), step_sizes = fractions<T>(2 * PARAMETERS, 100);
  std::vector<T> scratch(4 * blocks);
  std::string hashes;
  for (int step = 0; step < 3; step++) {
    const int update = step == 0 && threads > 1 ? 3 : 1 + step % 2;  // caution, or 1 or 2 directions
    std::vector<double> squares(PARAMETERS), sums((1 + update) * PARAMETERS);
    Lib::square_sums(runs.data(), parts, PARAMETERS, squares.data(), scratch.data(), threads);
    Lib::moments_and_norms(runs.data(), parts, update, table.data(), PARAMETERS, sums.data(), scratch.data(), threads);
    Lib::apply(runs.data(), parts, update, table.data(), PARAMETERS, step_sizes.data(), threads);
    hashes += hash_of(squares) + hash_of(sums);
    for (int kind = 0; kind < 5; kind++)
      for (const Memory &each : memory[kind])
        if (kind != 2) hashes += each.hash();
    if (model != NONE)
      for (int64_t part = 0; part < parts; part++) memory[1][part].fill(0, LENGTHS[flat ? 0 : part], false, 2);
  }
  std::printf("steps %s %s %d %d %d %d threads %d:%s\n", Lib::name, flat ? "flat" : "scattered", int(weight), int(model),
              int(grad), int(moment), int(threads), hashes.c_str());
}

template <typename T>
void average(int64_t wire, int64_t own, bool add, int64_t threads) {
  typedef Library<T> Lib;
  state = 2;
  int64_t blocks = 0;
  for (const int64_t length : LENGTHS) blocks += blocks_of(length);
  const int64_t numel = blocks * BLOCK, compute = sizeof(T) == 4 ? F32 : F64;
  Memory grad(compute, numel, 0), rows(wire, 2 * numel, 0);
  std::vector<Memory> sources;
  std::vector<Slice> slices;
  for (int64_t p = 0; p < PARAMETERS; p++) sources.emplace_back(own, LENGTHS[p], p + 1);
  int64_t block = 0;
  for (int64_t p = 0; p < PARAMETERS; p++) {
    const int64_t start = block * BLOCK;
    sources[p].fill(0, LENGTHS[p], false, 16);
    grad.fill(start, start + LENGTHS[p], false, 16);
    for (int64_t row = 0; row < 2; row++) rows.fill(row * numel + start, row * numel + start + LENGTHS[p], false, 16);
    Slice slice;
    slice.source = p == 2 ? 0 : (int64_t)sources[p].start();
    slice.dtype = own, slice.shard_start = start, slice.length = LENGTHS[p], slice.param = p, slice.first_block = block;
    slices.push_back(slice);
    block += blocks_of(LENGTHS[p]);
  }
  std::vector<double> sums(PARAMETERS);
  std::vector<T> scratch(blocks);
  Lib::average((T *)grad.start(), slices.data(), PARAMETERS, rows.start(), 2, wire, numel, 1, 3, add, PARAMETERS,
               sums.data(), scratch.data(), threads);
  std::printf("average %s %d %d %d threads %d:%s%s\n", Lib::name, int(wire), int(own), int(add), int(threads),
              hash_of(sums).c_str(), grad.hash().c_str());
}

template <typename T>
void all() {
  const int64_t compute = sizeof(T) == 4 ? F32 : F64;
  for (const int64_t threads : {1, 3})
    for (const bool flat : {true, false}) {
      for (const int64_t grad : {F32, BF16, F16, F64})
        for (const int64_t moment : {F32, BF16, F16, F64})
          for (const int64_t model : {NONE, BF16, F16, F32})
            if (threads == 1 || grad == moment) two_steps<T>(flat, compute, model, grad, moment, threads);
      if (sizeof(T) == 4)
        for (const int64_t weight : {BF16, F16}) two_steps<T>(flat, weight, NONE, weight, F32, threads);
      if (sizeof(T) == 4)
        for (const int64_t remainder : {REMAINDER, REMAINDER8})
          for (const int64_t grad : {F32, BF16}) two_steps<T>(flat, remainder, BF16, grad, F32, threads);
      for (const int64_t wire : {F32, BF16, F16, F64})
        for (const int64_t own : {F32, BF16, F16}) average<T>(wire, own, flat, threads);
    }
}

int main() {
  all<float>();
  all<double>();
}
