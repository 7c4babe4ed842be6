// `filter` of kernels/filter.cu on a CPU: one block after another.
#include "host_block.h"

#include <cmath>
#include <cstring>

// Only one thread runs at a time.
template <class T> static T atomicAdd(T* at, T value) { const T old = *at; *at += value; return old; }
template <class T> static T atomicMin(T* at, T value) { const T old = *at; *at = std::min(old, value); return old; }
template <class T> static T atomicMax(T* at, T value) { const T old = *at; *at = std::max(old, value); return old; }
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }

#include "filter.cu"

extern "C" bool host_filter(int threads, unsigned seed, int count, float* logits, int vocab, const long long* rows, const float* temperature,
                            const float* log_min_p, const int* top_k, const float* top_p) {
  for (int i = 0; i < count; ++i)
    if (!block::run(threads, seed + i, [=] {
          blockIdx.x = i;
          filter(logits, vocab, rows, temperature, log_min_p, top_k, top_p);
        }))
      return false;
  return true;
}
