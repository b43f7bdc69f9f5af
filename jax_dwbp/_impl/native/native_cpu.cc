// What XLA calls: one handler for the three ops on a CPU.
//
// It checks what it is given, chooses the instruction set and the kind of vectors (choice.cc), and
// turns exceptions to errors. In vectors of channels (channel_schedule.cc, channel_reduction.cc) are
// the adjacent channels of one pixel. In vectors of rows (row_schedule.cc, row_reduction.cc) are
// neighbours in a row, which is better where channels are few or lie far apart, and in vectors of
// planes (plane_schedule.cc) several rows, where they are short.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "channel_axis.h"
#include "channel_schedule.h"
#include "choice.h"
#include "kernels.h"
#include "plane_schedule.h"
#include "row_axis.h"
#include "row_schedule.h"
#include "runtime.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dwbp {
namespace {

const Kernels* KernelsFor(ffi::DataType dtype) {
  Type type;
  switch (dtype) {
    case ffi::F16:
      type = Type::kFloat16;
      break;
    case ffi::BF16:
      type = Type::kBFloat16;
      break;
    case ffi::F32:
      type = Type::kFloat32;
      break;
    case ffi::F64:
      type = Type::kFloat64;
      break;
    default:
      return nullptr;
  }
#ifdef JAX_DWBP_X86
  // For tests, and to find out what an instruction set is worth.
  static const std::string most = [] {
    const char* value = std::getenv("JAX_DWBP_MAX_ISA");
    return std::string(value ? value : "");
  }();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && most != "avx2" && most != "baseline") return &Avx512Kernels(type);
  if (avx2 && most != "baseline") return &Avx2Kernels(type);
#endif
  return &BaselineKernels(type);
}

enum class Op { kForward, kInputGrad, kFilterGrad };

std::optional<Op> OpOf(std::string_view name) {
  if (name == "forward") return Op::kForward;
  if (name == "input_grad") return Op::kInputGrad;
  if (name == "filter_grad") return Op::kFilterGrad;
  return std::nullopt;
}

// The sizes of the three arrays, with an axis of problems, be it one of size 1.
struct Shapes {
  int64_t x[5] = {1}, f[5] = {1}, y[5] = {1};
};

// Of each of these what is wrong, or null. Nothing below looks at it again.
const char* WrongWindow(ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
                        ffi::Span<const int64_t> rhs_dilation) {
  const auto positive = [](ffi::Span<const int64_t> values) {
    return values.size() == 2 && values[0] >= 1 && values[1] >= 1;
  };
  if (!positive(window_strides)) return "`window_strides` must be two positive integers";
  if (low.size() != 2) return "`low` must be two integers";
  if (!positive(rhs_dilation)) return "`rhs_dilation` must be two positive integers";
  return nullptr;
}

const char* WrongArrays(const ffi::AnyBuffer& x, const ffi::AnyBuffer& f, const ffi::AnyBuffer& y) {
  const size_t rank = x.dimensions().size(), filter_rank = f.dimensions().size();
  if (f.element_type() != x.element_type() || y.element_type() != x.element_type()) {
    return "x, f and y must be of one dtype";
  }
  if (rank < 4 || rank > 5) return "x must have 4 or 5 dimensions";
  if (y.dimensions().size() != rank) return "y must have as many dimensions as x";
  if (filter_rank < 4 || filter_rank > rank) return "f must have 4 dimensions or those of x";
  for (const ffi::AnyBuffer* array : {&x, &f, &y}) {
    if (array->element_count() == 0) return "no array may be empty";
  }
  return nullptr;
}

const char* WrongShapes(const Shapes& shapes, bool shared_filter, bool channels_first) {
  const auto& [x, f, y] = shapes;
  const int depth = channels_first ? 2 : 4;
  if (y[0] != x[0]) return "y must have the problems of x";
  if (!shared_filter && f[0] != x[0]) return "f must have the problems of x";
  if (y[1] != x[1]) return "y must have the batch size of x";
  if (f[3] != x[depth]) return "f must have the channels of x";
  if (y[depth] != f[3] * f[4]) return "y must have the channels of x times the multiplier of f";
  return nullptr;
}

// What is asked, once that is known to be right.
struct Request {
  Op op;
  const Kernels& kernels;
  Shapes shapes;
  bool channels_first;
  ffi::Span<const int64_t> strides, low, dilations;
  Tensor x, f, y;

  bool IsTransposed() const { return op == Op::kInputGrad; }
  // What is read and what is written or, for a filter gradient, x and y.
  const Tensor& In() const { return IsTransposed() ? y : x; }
  const Tensor& Out() const { return IsTransposed() ? x : y; }
  Sizes ArraySizes() const {
    return {.problems = shapes.x[0],
            .batch = shapes.x[1],
            .channels = shapes.f[3],
            .multiplier = shapes.f[4],
            .kernel_rows = shapes.f[1],
            .kernel_columns = shapes.f[2]};
  }
  // Of the axis of rows, which is 0, or of columns, which is 1.
  int64_t XSize(int axis) const { return shapes.x[(channels_first ? 3 : 2) + axis]; }
  int64_t YSize(int axis) const { return shapes.y[(channels_first ? 3 : 2) + axis]; }
  int64_t KernelSize(int axis) const { return shapes.f[1 + axis]; }
};

RowAxis RowAxisOf(const Request& request, int axis) {
  const int64_t x = request.XSize(axis), y = request.YSize(axis), kernel = request.KernelSize(axis);
  const int64_t dilation = kernel == 1 ? 1 : request.dilations[axis];
  const int64_t stride = request.strides[axis], low = request.low[axis];
  if (!request.IsTransposed()) return RowAxis(x, y, kernel, dilation, -low, stride, false);
  return RowAxis(y, x, kernel, dilation, low - dilation * (kernel - 1), stride, true);
}

Axis ChannelAxisOf(const Request& request, int axis) {
  const Window window{.kernel = request.KernelSize(axis),
                      .stride = request.strides[axis],
                      .low = request.low[axis],
                      .dilation = request.dilations[axis]};
  const int64_t x = request.XSize(axis), y = request.YSize(axis);
  return request.IsTransposed() ? TransposedAxis(x, y, window) : ForwardAxis(x, y, window);
}

void Dispatch(ffi::ThreadPool& pool, const Request& request) {
  const bool is_filter_grad = request.op == Op::kFilterGrad;
  const RowCall by_rows{.kernels = request.kernels,
                        .sizes = request.ArraySizes(),
                        .channels_first = request.channels_first,
                        .is_transposed = request.IsTransposed(),
                        .rows = RowAxisOf(request, 0),
                        .columns = RowAxisOf(request, 1),
                        .in = request.In(),
                        .filter = request.f,
                        .out = request.Out()};
  switch (Choose(by_rows, is_filter_grad)) {
    case Vectors::kRows:
      return (is_filter_grad ? CorrelateRows : ConvolveRows)(pool, by_rows);
    case Vectors::kPlanes:
      return ConvolvePlanes(pool, by_rows);
    case Vectors::kChannels:
      break;
  }
  const ChannelCall by_channels{.kernels = request.kernels,
                                .sizes = request.ArraySizes(),
                                .is_transposed = request.IsTransposed(),
                                .rows = ChannelAxisOf(request, 0),
                                .columns = ChannelAxisOf(request, 1),
                                .in = request.In(),
                                .filter = request.f,
                                .out = request.Out()};
  (is_filter_grad ? CorrelateChannels : ConvolveChannels)(pool, by_channels);
}

ffi::Error DepthwiseConv2d(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                           ffi::Result<ffi::AnyBuffer> result, std::string_view op_name,
                           ffi::Span<const int64_t> window_strides, ffi::Span<const int64_t> low,
                           ffi::Span<const int64_t> rhs_dilation, bool channels_first) try {
  const std::optional<Op> op = OpOf(op_name);
  if (!op) return ffi::Error::InvalidArgument("`op` must be forward, input_grad or filter_grad");
  const ffi::AnyBuffer& x = op == Op::kInputGrad ? *result : a;
  const ffi::AnyBuffer& f = op == Op::kForward ? b : op == Op::kInputGrad ? a : *result;
  const ffi::AnyBuffer& y = op == Op::kForward ? *result : b;
  const Kernels* kernels = KernelsFor(x.element_type());
  const char* wrong = kernels ? nullptr : "x must be of float16, bfloat16, float32 or float64";
  if (!wrong) wrong = WrongWindow(window_strides, low, rhs_dilation);
  if (!wrong) wrong = WrongArrays(x, f, y);
  if (wrong) return ffi::Error::InvalidArgument(wrong);

  Shapes shapes;
  auto& [xs, fs, ys] = shapes;
  const auto copy = [](const ffi::AnyBuffer& from, int64_t* to) {
    std::copy_backward(from.dimensions().begin(), from.dimensions().end(), to + 5);
  };
  copy(x, xs), copy(f, fs), copy(y, ys);
  const bool shared_filter = f.dimensions().size() < x.dimensions().size();
  if ((wrong = WrongShapes(shapes, shared_filter, channels_first))) {
    return ffi::Error::InvalidArgument(wrong);
  }
  if (shared_filter) {
    // All problems are one.
    for (int64_t* shape : {xs, ys}) shape[1] *= std::exchange(shape[0], 1);
  }
  Dispatch(pool, {.op = *op,
                  .kernels = *kernels,
                  .shapes = shapes,
                  .channels_first = channels_first,
                  .strides = window_strides,
                  .low = low,
                  .dilations = rhs_dilation,
                  .x = Tensor(x.untyped_data(), xs, channels_first),
                  .f = Tensor(f.untyped_data(), fs, false),
                  .y = Tensor(y.untyped_data(), ys, channels_first)});
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  // A text that is short enough to take no memory.
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
} catch (const std::exception& error) {
  return ffi::Error(ffi::ErrorCode::kInternal, error.what());
}

}  // namespace
}  // namespace jax_dwbp

// Of the headers. A jaxlib with an older one refuses the handler.
extern "C" __attribute__((visibility("default")))
const int jax_dwbp_ffi_version[] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* jax_dwbp_depthwise_conv2d(
    XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_dwbp_depthwise_conv2d, jax_dwbp::DepthwiseConv2d,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("op")
                                  .Attr<xla::ffi::Span<const int64_t>>("window_strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("low")
                                  .Attr<xla::ffi::Span<const int64_t>>("rhs_dilation")
                                  .Attr<bool>("channels_first"));
