// Memory for what is made of one block, kept by each thread and used again for every block.
#pragma once

#include <cstdlib>
#include <new>

#include "vectors.h"

namespace VARIANT {

class Scratch {
  public:
    // Room for so many bytes in all, which `take` hands out in pieces; what was taken before is void.
    void reserve(int64_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = up_to_multiple(bytes, 4096);
            memory = (char *)std::aligned_alloc(64, size);
            if (!memory) throw std::bad_alloc();
        }
        used = 0;
    }
    template <class T> T *take(int64_t count) {
        T *place = (T *)(memory + used);
        used += bytes<T>(count);
        return place;
    }
    template <class T> static int64_t bytes(int64_t count) { return up_to_multiple(count * int64_t(sizeof(T)), 64); }
    ~Scratch() { std::free(memory); }

  private:
    char *memory = nullptr;
    int64_t size = 0, used = 0;
};

} // namespace VARIANT
