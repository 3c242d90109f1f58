// Threads that wait for work. One call at a time uses them; a call that finds them busy does its work alone. Whoever
// waits looks for some time before it sleeps: to wake a thread takes as long as reading half a megabyte, and of a
// model's layers one call follows another.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tersekv {

class Pool {
 public:
  static Pool& shared();
  // Runs task(0..count-1), each once, on up to `threads` threads, the caller's included. Tasks must not throw.
  void run(int count, int threads, const std::function<void(int)>& task);

 private:
  void grow(int workers);
  void work(int index);
  void take_tasks(const std::function<void(int)>& task);

  std::mutex busy_, state_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* task_ = nullptr;
  int count_ = 0, next_ = 0, allowed_ = 0;
  std::atomic<int> running_{0};          // written with `state_` held, as all of these
  std::atomic<unsigned> generation_{0};
};

}  // namespace tersekv
