// counted [COUNT]: calls each function of the C interface once on COUNT elements of every kind of memory, in one run.
// Under callgrind, one dump of counts a case. Without it, prints where each case's memory is: CASE KIND START END.
// structs.h: native.py's RUN and SLICE, and its numbers (drivers.py writes it).

#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "structs.h"

extern "C" {
void lamb_square_sums_f32(const Run *, int64_t, int64_t, double *, float *, int64_t);
void lamb_moments_and_norms_f32(const Run *, int64_t, int64_t, const void *, int64_t, double *, float *, int64_t);
void lamb_apply_f32(const Run *, int64_t, int64_t, const void *, int64_t, const float *, int64_t);
void lamb_weight_norms_f32(const Run *, int64_t, int64_t, double *, float *, int64_t);
void lamb_apply_momentum_f32(const Run *, int64_t, const void *, int64_t, const float *, int64_t);
void lamb_average_f32(float *, const Slice *, int64_t, char *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      double *, float *, int64_t);
}

int64_t count;
double sums[4];
float *of_blocks, table[COLUMNS] = {1, 0, .9f, .1f, .999f, .001f, 1, 1, 0, 1e-6f, .01f, 1, 3}, step_sizes[2] = {1e-4f, 1e-4f};

// Zeros: counts do not depend on values.
int64_t memory(const char *of_case, const char *kind, int64_t dtype, int64_t length) {
  if (dtype == NONE) return 0;
  const int64_t bytes = length * (dtype == F64 ? 8 : dtype == F32 ? 4 : dtype == REMAINDER8 ? 1 : 2) * (dtype == CODES ? 260. / 512 : 1);
  char *start = (char *)aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  std::printf("%s %s %llx %llx\n", of_case, kind, (unsigned long long)start, (unsigned long long)(start + bytes));
  std::fflush(stdout);
  return (int64_t)start;
}

enum Function { SQUARE_SUMS, MOMENTS_AND_NORMS, APPLY, WEIGHT_NORMS, APPLY_MOMENTUM };

void run(const char *name, Function function, int64_t weight, int64_t model, int64_t grad, int64_t state,
         int64_t update = 1) {
  Run run;
  run.weight = memory(name, "weight", weight, count), run.model = memory(name, "model", model, count);
  run.grad = memory(name, "grad", grad, count);
  run.exp_avg = memory(name, "exp_avg", state, count), run.exp_avg_sq = memory(name, "exp_avg_sq", state, count);
  run.block_param = run.param = run.first_block = 0, run.numel = count;
  run.weight_dtype = weight, run.model_dtype = model, run.grad_dtype = grad, run.state_dtype = state;
  CALLGRIND_ZERO_STATS;
  if (function == SQUARE_SUMS) lamb_square_sums_f32(&run, 1, 1, sums, of_blocks, 1);
  if (function == MOMENTS_AND_NORMS) lamb_moments_and_norms_f32(&run, 1, update, table, 1, sums, of_blocks, 1);
  if (function == WEIGHT_NORMS) lamb_weight_norms_f32(&run, 1, 1, sums, of_blocks, 1);
  if (function == APPLY_MOMENTUM) lamb_apply_momentum_f32(&run, 1, table, 1, step_sizes, 1);
  if (function == APPLY) lamb_apply_f32(&run, 1, update, table, 1, step_sizes, 1);
  CALLGRIND_DUMP_STATS_AT(name);
}

void average(const char *name, int64_t dtype) {
  float *grad = (float *)memory(name, "grad", F32, count);
  const Slice slice{memory(name, "own", dtype, count), dtype, 0, count, 0, 0};
  char *row = (char *)memory(name, "row", dtype, count);
  CALLGRIND_ZERO_STATS;
  lamb_average_f32(grad, &slice, 1, row, 1, dtype, count, 0, 2, 0, 1, sums, of_blocks, 1);
  CALLGRIND_DUMP_STATS_AT(name);
}

int main(int, char **arguments) {
  count = std::atoll(arguments[1]);
  of_blocks = (float *)std::calloc(4 * (count / BLOCK + 1), sizeof(float));
  run("square_sums_f32", SQUARE_SUMS, F32, NONE, F32, F32);
  run("square_sums_bf16", SQUARE_SUMS, F32, NONE, BF16, F32);
  run("square_sums_f16", SQUARE_SUMS, F32, NONE, F16, F32);
  run("pass_1_f32", MOMENTS_AND_NORMS, F32, NONE, F32, F32);
  run("pass_2_f32", APPLY, F32, NONE, F32, F32);
  run("pass_1_bf16", MOMENTS_AND_NORMS, F32, BF16, BF16, F32);
  run("pass_2_bf16", APPLY, F32, BF16, BF16, F32);
  run("pass_1_f16", MOMENTS_AND_NORMS, F32, F16, F16, F32);
  run("pass_2_f16", APPLY, F32, F16, F16, F32);
  run("pass_1_remainder", MOMENTS_AND_NORMS, REMAINDER, BF16, BF16, F32);
  run("pass_2_remainder", APPLY, REMAINDER, BF16, BF16, F32);
  run("pass_1_remainder8", MOMENTS_AND_NORMS, REMAINDER8, BF16, BF16, F32);
  run("pass_2_remainder8", APPLY, REMAINDER8, BF16, BF16, F32);
  run("pass_1_bf16_state", MOMENTS_AND_NORMS, F32, BF16, BF16, BF16);
  run("pass_2_bf16_state", APPLY, F32, BF16, BF16, BF16);
  run("pass_1_bf16_alone", MOMENTS_AND_NORMS, BF16, NONE, BF16, BF16);
  run("pass_2_bf16_alone", APPLY, BF16, NONE, BF16, BF16);
  run("pass_1_codes", MOMENTS_AND_NORMS, F32, NONE, F32, CODES);
  run("pass_2_codes", APPLY, F32, NONE, F32, CODES);
  run("pass_1_codes_remainder8", MOMENTS_AND_NORMS, REMAINDER8, BF16, BF16, CODES);
  run("pass_2_codes_remainder8", APPLY, REMAINDER8, BF16, BF16, CODES);
  run("pass_1_nesterov", MOMENTS_AND_NORMS, F32, NONE, F32, F32, 2);
  run("pass_2_nesterov", APPLY, F32, NONE, F32, F32, 2);
  run("weight_norms_f32", WEIGHT_NORMS, F32, NONE, F32, F32);
  run("weight_norms_bf16", WEIGHT_NORMS, F32, BF16, BF16, F32);
  run("momentum_f32", APPLY_MOMENTUM, F32, NONE, F32, F32);
  run("momentum_bf16", APPLY_MOMENTUM, F32, BF16, BF16, F32);
  run("pass_1_caution", MOMENTS_AND_NORMS, F32, NONE, F32, F32, 3);
  run("pass_2_caution", APPLY, F32, NONE, F32, F32, 3);
  average("average_f32", F32);
  average("average_bf16", BF16);
  average("average_f16", F16);
}
