// What XLA does for a handler: it calls it with buffers and attributes, and lends it a pool of threads.

#ifndef JAX_DWBP_TESTS_SANITIZERS_HOST_H_
#define JAX_DWBP_TESTS_SANITIZERS_HOST_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* jax_dwbp_depthwise_conv2d(XLA_FFI_CallFrame*);

struct XLA_FFI_Error {
  std::string message;
  XLA_FFI_Error_Code code;
};

// Memory that a test denies the handler, on all threads: so many allocations succeed, then the next one
// fails or, to the end of the call, all do. What the host allocates in between isn't counted.
inline std::atomic<int64_t> allocations_left{INT64_MAX};
inline std::atomic<bool> all_fail{false};
inline thread_local bool is_host = true;

inline void CountAllocation() {
  if (is_host) return;
  const int64_t left = allocations_left.fetch_sub(1);
  if (left == 0 || (left < 0 && all_fail)) throw std::bad_alloc();
}

// Where the code of the handler begins and ends.
class Within {
 public:
  explicit Within(bool host) : was_(std::exchange(is_host, host)) {}
  ~Within() { is_host = was_; }

 private:
  bool was_;
};

// When threads of the pool take up what they are given: at once, or when all is done and what the call
// owned is gone. Or the pool refuses it, or there is none.
enum Arrival { kAtOnce, kTooLate, kRefused, kNone };

// The pool. Each task has a thread of its own.
struct XLA_FFI_ExecutionContext {
  Arrival arrival;
  std::vector<std::function<void()>> waiting{};
  std::vector<std::thread> threads{};

  void Schedule(XLA_FFI_Task* function, void* data) {
    const Within host(true);
    std::function<void()> task = [function, data] {
      const Within handler(false);
      function(data);
    };
    if (arrival == kTooLate) return waiting.push_back(std::move(task));
    std::atomic<bool> started{false};
    threads.emplace_back([&started, task = std::move(task)] {
      started = true;
      task();
    });
    while (!started) std::this_thread::yield();
  }
  void Finish() {
    for (auto& task : waiting) threads.emplace_back(std::move(task));
    for (std::thread& thread : threads) thread.join();
  }
};

inline XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) {
  const Within host(true);
  return new XLA_FFI_Error{args->message, args->errc};
}
inline void GetMessage(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}
inline void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

inline XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const Within host(true);
  if (args->ctx->arrival == kRefused) {
    return new XLA_FFI_Error{"the pool takes nothing", XLA_FFI_Error_Code_UNAVAILABLE};
  }
  args->ctx->Schedule(args->task, args->data);
  return nullptr;
}
inline XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  const Within host(true);
  if (args->ctx->arrival == kNone) {
    return new XLA_FFI_Error{"there is no pool", XLA_FFI_Error_Code_UNAVAILABLE};
  }
  *args->num_threads = 4;
  return nullptr;
}

// What the handler is asked to do, of two arguments and a result.
struct Request {
  std::string op;
  bool channels_first;
  std::vector<int64_t> window_strides, low, rhs_dilation;
  XLA_FFI_Buffer buffers[3];
};

// Calls the handler and returns its error.
inline XLA_FFI_Error* Handle(Request request, XLA_FFI_ExecutionContext& pool) {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = CreateError;
  api.XLA_FFI_Error_GetMessage = GetMessage;
  api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_ThreadPool_Schedule = Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;

  XLA_FFI_ArgType arg_types[] = {XLA_FFI_ArgType_BUFFER, XLA_FFI_ArgType_BUFFER};
  XLA_FFI_RetType ret_types[] = {XLA_FFI_RetType_BUFFER};
  void* args[] = {&request.buffers[0], &request.buffers[1]};
  void* rets[] = {&request.buffers[2]};

  XLA_FFI_ByteSpan op{request.op.data(), request.op.size()};
  XLA_FFI_Scalar channels_first{XLA_FFI_DataType_PRED, &request.channels_first};
  const auto array = [](std::vector<int64_t>& values) {
    return XLA_FFI_Array{XLA_FFI_DataType_S64, values.size(), values.data()};
  };
  XLA_FFI_Array window_strides = array(request.window_strides), low = array(request.low),
                rhs_dilation = array(request.rhs_dilation);
  // In the order of their names.
  XLA_FFI_ByteSpan names[] = {
      {"channels_first", 14}, {"low", 3}, {"op", 2}, {"rhs_dilation", 12}, {"window_strides", 14}};
  XLA_FFI_ByteSpan* name_pointers[] = {names, names + 1, names + 2, names + 3, names + 4};
  constexpr XLA_FFI_AttrType kScalar = XLA_FFI_AttrType_SCALAR, kArray = XLA_FFI_AttrType_ARRAY;
  XLA_FFI_AttrType attr_types[] = {kScalar, kArray, XLA_FFI_AttrType_STRING, kArray, kArray};
  void* attrs[] = {&channels_first, &low, &op, &rhs_dilation, &window_strides};

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &pool;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, 2, arg_types, args};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, 1, ret_types, rets};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 5, attr_types, name_pointers, attrs};
  const Within handler(false);
  return jax_dwbp_depthwise_conv2d(&frame);
}

#endif  // JAX_DWBP_TESTS_SANITIZERS_HOST_H_
