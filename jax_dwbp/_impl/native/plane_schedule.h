// The forward op and the input gradient by planes.

#ifndef JAX_DWBP_PLANE_SCHEDULE_H_
#define JAX_DWBP_PLANE_SCHEDULE_H_

#include "row_schedule.h"

namespace jax_dwbp {

// Whether planes are what there is, and narrower than a vector.
bool HasNarrowPlanes(const RowCall& call);

// Of a plane of the result.
int64_t PlaneLines(const RowCall& call);

void ConvolvePlanes(ffi::ThreadPool& pool, const RowCall& call);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_PLANE_SCHEDULE_H_
