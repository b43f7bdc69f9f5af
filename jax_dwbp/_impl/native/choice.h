// Which vectors a call is computed with.

#ifndef JAX_DWBP_CHOICE_H_
#define JAX_DWBP_CHOICE_H_

#include "row_schedule.h"

namespace jax_dwbp {

enum class Vectors { kChannels, kRows, kPlanes };

// The quickest, by the sizes, the layout, the data type and the instruction set.
Vectors Choose(const RowCall& call, bool is_filter_grad);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_CHOICE_H_
