// How the forward op and the input gradient by rows are cut to tasks.

#ifndef JAX_DWBP_ROW_PLAN_H_
#define JAX_DWBP_ROW_PLAN_H_

#include "row_lanes.h"
#include "row_schedule.h"

namespace jax_dwbp {

// How a result is cut to tasks: slices of planes, of large ones bands of rows, of long rows tiles. All
// of a part is of each phase.
struct RowPlan {
  const RowCall& call;
  const RowKernels& kernels;
  int64_t period, lanes, line_step, variants, slices;
  RowPixels pixels;  // as they are packed
  int64_t repeats;   // of their values, as they are read
  int64_t threads;
  int64_t tile, tiles;    // columns
  bool by_row;            // no rows are computed together
  int64_t band, bands;    // rows, with those that are computed in vain
  int64_t group, groups;  // slices
  int64_t filters;        // that are packed at a time
  int64_t in_step;        // values from one packed row to the next
  int64_t phase_step;     // elements from one phase of a row to the next, before they are stored
  int64_t variant_lines, weight_lines, phase_lines, source_lines, lines;
  std::vector<int64_t> reads;  // of the columns of the filter: values from where a row starts

  RowPlan(const RowCall& call, int64_t pool_threads);

  // What a kernel is called for, at most, for a part of so many rows.
  int64_t Sums(int64_t rows) const {
    return call.rows.OutPhases() * call.columns.OutPhases() * std::min(call.rows.dilation, rows) *
           variants;
  }
};

// Whether rows can compute it in the scratch that is allowed.
bool HasRows(const RowCall& call, bool is_filter_grad);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_ROW_PLAN_H_
