// A pool of threads that live as long as the pool: they spin briefly for the next piece of work and then sleep.
//
// A decoder step is some hundred short parallel regions. Waking a sleeping thread costs more than many of them, so a
// worker spins first; it sleeps after `kSpins` rounds, so that an idle engine costs nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace fettle {

class ThreadPool {
 public:
  // threads ≥ 1, the caller's own counted; pinned: worker i stays on the i-th processor that the process may use.
  explicit ThreadPool(int threads, bool pinned = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(first, last) for pieces of 0 … items-1, whole `grain`s but for the end, on all threads; returns when all
  // are done. Who takes which piece is chance; a body must write only what its items own.
  template <typename Body>
  void run(int64_t items, int64_t grain, Body&& body) {
    if (items <= 0) return;
    if (workers_.empty() || items <= grain) {
      body(int64_t{0}, items);
      return;
    }
    using Plain = std::remove_reference_t<Body>;
    start([](void* context, int64_t first, int64_t last) { (*static_cast<Plain*>(context))(first, last); },
          const_cast<void*>(static_cast<const void*>(&body)), items, grain);
  }

 private:
  using Call = void (*)(void* context, int64_t first, int64_t last);
  void start(Call call, void* context, int64_t items, int64_t grain);
  void work();
  void live(int index, bool pinned);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};     // which piece of work is the newest
  std::atomic<int64_t> next_{0};       // first item that nobody took
  std::atomic<int> busy_{0};           // workers that are not done with the newest
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t items_ = 0, grain_ = 1;
};

}  // namespace fettle
