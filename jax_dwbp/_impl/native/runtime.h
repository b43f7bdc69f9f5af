// Memory and threads, of both kinds of vectors.

#ifndef JAX_DWBP_RUNTIME_H_
#define JAX_DWBP_RUNTIME_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "depth_axis.h"
#include "kernels.h"
#include "row_axis.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dwbp {

namespace ffi = xla::ffi;

// Scratch that a thread keeps from one call to the next.
constexpr int64_t kKeptBytes = 2 << 20;
// Lines that one thread multiplies in the time that it takes to wake another.
constexpr int64_t kSmall = 1 << 14;
// How often the calling thread looks whether the others are done, before it sleeps.
constexpr int kSpins = 200;

struct Sizes {
  int64_t problems, batch, channels, multiplier, kernel_rows, kernel_columns;

  // Of a slice of the filter.
  int64_t SliceTaps() const { return kernel_rows * kernel_columns; }
};

// ---------------------------------------------------------------------------------------------------
// Memory.

// An array of the caller, [G,N,D,H,W,C] or [G,N,C,D,H,W]. Steps are in elements.
struct Tensor {
  char* data;
  int64_t problem, image, slice, row, column, channel;

  Tensor(void* data, const int64_t* sizes, bool channels_first)
      : data(static_cast<char*>(data)),
        problem(sizes[1] * sizes[2] * sizes[3] * sizes[4] * sizes[5]),
        image(sizes[2] * sizes[3] * sizes[4] * sizes[5]),
        slice(sizes[4] * sizes[5] * (channels_first ? 1 : sizes[3])),
        row(channels_first ? sizes[5] : sizes[4] * sizes[5]),
        column(channels_first ? 1 : sizes[5]),
        channel(channels_first ? sizes[3] * sizes[4] * sizes[5] : 1) {}
};

// What a thread works in.
struct Scratch {
  std::unique_ptr<Line[]> memory;
  int64_t capacity = 0;
  std::vector<int64_t> held;  // for each slot, which row or filter is packed there
  std::vector<DepthTap> met;  // taps of the depth that write a slice
  std::vector<const char*> rows;
  std::vector<const Line*> weights[2];
  std::vector<Line*> sums;
  int64_t filter = -1;          // whose weights are packed
  std::vector<Tap> taps;        // of each phase, one phase after the other
  std::vector<int64_t> starts;  // of the phases, and the end
  int64_t tile = -1;            // whose taps they are

  Line* Lines(int64_t count) {
    if (count > capacity) {
      Free();
      memory.reset(new Line[count]);
      capacity = count;
    }
    return memory.get();
  }
  void Free() {
    memory.reset();
    capacity = 0;
  }
  void Trim() {
    if (capacity * static_cast<int64_t>(sizeof(Line)) > kKeptBytes) Free();
    if (taps.capacity() * static_cast<int64_t>(sizeof(Tap)) > kKeptBytes) taps = std::vector<Tap>();
  }
};

// One for each thread, whatever it runs.
inline Scratch& ThreadScratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// A large array that was just allocated has no pages yet. Huge ones are there ten times as fast. With
// JAX_DWBP_HUGE_PAGES=0 the system decides.
inline void PreferHugePages(char* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20;
  const int64_t start = CeilDiv(reinterpret_cast<int64_t>(data), kPage) * kPage;
  const int64_t end = (reinterpret_cast<int64_t>(data) + bytes) / kPage * kPage;
  static const bool allowed = [] {
    const char* value = std::getenv("JAX_DWBP_HUGE_PAGES");
    return !value || value != std::string_view("0");
  }();
  if (!allowed || end - start < 4 * kPage) return;
  // Has it a page, it was written before: to look is cheaper than to stop all who ask for memory.
  unsigned char page = 0;
  void* const first = reinterpret_cast<void*>(start);
  if (mincore(first, 1, &page) == 0 && page & 1) return;
  madvise(first, end - start, MADV_HUGEPAGE);
#endif
}

// ---------------------------------------------------------------------------------------------------
// Threads.

// A share of the tasks for each thread. The calling thread has the first: where there are two, each
// meets in its caches what it left there at the call before.
struct Loop {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares;
  std::atomic<int64_t> done{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first
  std::mutex mutex;
  std::condition_variable finished;

  Loop(int64_t count, int64_t threads) : shares(threads) {
    for (int64_t i = 0; i < threads; ++i) {
      shares[i].next = i * count / threads;
      shares[i].end = (i + 1) * count / threads;
    }
  }

  // Runs body(i) for all tasks i that are left, those of the share `own` first. Returns how many.
  template <typename Body>
  int64_t Run(int64_t own, const Body& body) {
    const int64_t all = shares.size();
    int64_t ran = 0;
    for (int64_t i = 0; i < all; ++i) {
      Share& share = shares[(own + i) % all];
      // Where nothing is left, nothing is written: others may be looking too.
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      for (int64_t task; (task = share.next.fetch_add(1)) < share.end; ++ran) body(task);
    }
    return ran;
  }
};

// Runs body(scratch, i) for all i below `count`, on this thread and on idle ones of XLA's pool. Throws
// what the first of them threw.
template <typename Body>
void ParallelFor(ffi::ThreadPool& pool, int64_t threads, int64_t count, int64_t lines,
                 const Body& body) {
  threads = std::max<int64_t>(std::min(threads, count), 1);  // a host may have no pool
  auto loop = std::make_shared<Loop>(count, threads);
  // A helper that comes late finds nothing left to do, and no longer looks at what this call owns.
  const auto work = [loop, count, lines, &body](int64_t own) {
    Scratch& scratch = ThreadScratch();
    scratch.filter = scratch.tile = -1;
    scratch.held.clear();
    const int64_t ran = loop->Run(own, [&](int64_t task) {
      // What is thrown may not end a thread of the pool, nor this call while others work for it. Only
      // what allocates throws.
      try {
        if (loop->failed) return;
        scratch.Lines(lines);
        body(scratch, task);
      } catch (...) {
        if (!loop->failed.exchange(true)) loop->error = std::current_exception();
      }
    });
    if (ran == 0) return;
    scratch.Trim();
    if (loop->done.fetch_add(ran) + ran == count) {
      std::lock_guard<std::mutex> lock(loop->mutex);
      loop->finished.notify_one();
    }
  };
  try {
    for (int64_t helper = 1; helper < threads; ++helper) {
      pool.Schedule([work, helper] { work(helper); });
    }
  } catch (const std::exception&) {
    // There are fewer of them.
  }
  work(0);
  // The others finish at about the same time, so it may not be worth going to sleep. But they may wait
  // for this core.
  for (int spin = 0; spin < kSpins && loop->done.load() < count; ++spin) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->finished.wait(lock, [&] { return loop->done.load() >= count; });
  if (loop->failed) std::rethrow_exception(loop->error);
}

}  // namespace jax_dwbp

#endif  // JAX_DWBP_RUNTIME_H_
