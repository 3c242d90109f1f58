// Memory that ends at a page which nobody may touch, behind canaries: a read or write too far faults, one too low
// shows.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace tersekv {

template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    room_ = (bytes + page) / page * page;  // at least one byte of canary
    void* mapped = mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || mprotect(static_cast<char*>(mapped) + room_, page, PROT_NONE)) std::abort();
    start_ = static_cast<uint8_t*>(mapped);
    std::memset(start_, CANARY, room_);
    data_ = reinterpret_cast<T*>(start_ + room_ - bytes);
    size_ = room_ + page;
  }
  explicit Guarded(const std::vector<T>& from) : Guarded(from.size()) {
    if (count_) std::memcpy(data_, from.data(), count_ * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    for (uint8_t* p = start_; p < reinterpret_cast<uint8_t*>(data_); p++)
      if (*p != CANARY) {
        std::fprintf(stderr, "a byte in front of an array was written\n");
        std::abort();
      }
    munmap(start_, size_);
  }
  T* data() { return data_; }
  size_t size() const { return count_; }

 private:
  static constexpr uint8_t CANARY = 0xa5;
  size_t count_, room_, size_;
  uint8_t* start_;
  T* data_;
};

}  // namespace tersekv
