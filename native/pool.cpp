#include "pool.h"

#include <chrono>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace tersekv {

namespace {

Pool* shared_pool;

void renew() { shared_pool = new Pool; }

void start() {
  renew();
#if defined(__unix__) || defined(__APPLE__)
  // A forked process has none of the threads, but a condition variable that waits for them.
  pthread_atfork(nullptr, nullptr, renew);
#endif
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Until `ready`, but not for longer than Python takes between two calls of a layer. Not where `threads` are more than
// processors: who looks would hold up who works.
template <class Ready>
void look(int threads, Ready ready) {
  using Clock = std::chrono::steady_clock;
  constexpr auto LONG = std::chrono::microseconds(100);
  static const int processors = int(std::thread::hardware_concurrency());
  if (threads > processors) return;
  for (const auto until = Clock::now() + LONG; !ready() && Clock::now() < until;)
    for (int i = 0; i < 16 && !ready(); i++) pause();
}

}  // namespace

// Never destroyed: while a process ends, its threads may be gone already.
Pool& Pool::shared() {
  static std::once_flag once;
  std::call_once(once, start);
  return *shared_pool;
}

void Pool::run(int count, int threads, const std::function<void(int)>& task) {
  std::unique_lock alone(busy_, std::try_to_lock);
  if (threads <= 1 || count <= 1 || !alone.owns_lock()) {
    for (int i = 0; i < count; i++) task(i);
    return;
  }
  grow(threads - 1);
  {
    std::lock_guard lock(state_);
    task_ = &task, count_ = count, next_ = 0, allowed_ = threads - 1, generation_++;
  }
  wake_.notify_all();
  take_tasks(task);
  {
    std::lock_guard lock(state_);
    allowed_ = 0;  // whoever wakes up only now finds nothing to do
  }
  look(threads, [this] { return running_ == 0; });
  std::unique_lock lock(state_);
  done_.wait(lock, [this] { return running_ == 0; });
  task_ = nullptr;
}

void Pool::grow(int workers) {
  while (int(threads_.size()) < workers) {
    const int index = int(threads_.size());
    threads_.emplace_back([this, index] { work(index); });
  }
}

void Pool::work(int index) {
  unsigned seen = 0;
  for (;;) {
    const std::function<void(int)>* task;
    look(index + 2, [&] { return generation_ != seen; });
    {
      std::unique_lock lock(state_);
      wake_.wait(lock, [&] { return generation_ != seen && index < allowed_; });
      seen = generation_, task = task_, running_++;
    }
    take_tasks(*task);
    {
      std::lock_guard lock(state_);
      running_--;
    }
    done_.notify_one();
  }
}

void Pool::take_tasks(const std::function<void(int)>& task) {
  for (;;) {
    int i;
    {
      std::lock_guard lock(state_);
      if (next_ >= count_) return;
      i = next_++;
    }
    task(i);
  }
}

}  // namespace tersekv
