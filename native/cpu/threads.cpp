#include "cpu/threads.h"

#include <algorithm>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fettle {
namespace {

constexpr int kSpins = 4000;  // about 50 µs

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void pin_to_nth_processor(int index) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int seen = 0;
  const int count = CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || seen++ != index % std::max(count, 1)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#else
  (void)index;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads, bool pinned) {
  for (int index = 1; index < threads; ++index) workers_.emplace_back([this, index, pinned] { live(index, pinned); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    round_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Call call, void* context, int64_t items, int64_t grain) {
  {
    std::lock_guard<std::mutex> lock(mutex_);  // a worker that is about to sleep sees the new round
    call_ = call;
    context_ = context;
    items_ = items;
    grain_ = std::max<int64_t>(grain, 1);
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  work();
  for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();  // somebody else has the processor that the last piece needs
    }
  }
}

// Large pieces first, so that a thread goes through memory in one direction for long; small ones at the end, so that
// nobody waits for the last (guided self-scheduling, Polychronopoulos and Kuck 1987).
void ThreadPool::work() {
  const int64_t shares = 2 * threads();
  int64_t first = next_.load(std::memory_order_relaxed);
  while (first < items_) {
    const int64_t share = std::max((items_ - first) / shares / grain_, int64_t{1}) * grain_;
    const int64_t last = std::min(first + share, items_);
    if (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
    call_(context_, first, last);
    first = next_.load(std::memory_order_relaxed);
  }
}

void ThreadPool::live(int index, bool pinned) {
  if (pinned) pin_to_nth_processor(index);
  uint64_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) pause_briefly();
    if (round_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
    }
    seen = round_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    work();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace fettle
