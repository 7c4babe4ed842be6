// What min-p, top-k and top-p leave of a row's logits: `_filter` of gpu_worker/sampler.py, which says what they mean.
//
// The k-th value, or the last value of the smallest set that holds a share p, is found without sorting (as a radix select is, but by
// weights as well as by counts): a histogram of what is left over 2,048 intervals of values, the interval in which the goal is reached, and
// again within that, until one value is left. Weights are summed as integers, so that the order of the sums does not matter.
//
// Values are compared as keys: unsigned integers in the order of the floats.
typedef unsigned int u32;
typedef unsigned long long u64;

#define BINS 2048
#define PER_CHUNK 32
#define FIRST_WIDTH 64.f  // intervals of the first histogram in a distance of 1 from the best; the last takes the rest
#define ONE 0x1p45f       // weight of the best token; 2^18 of them fit

__device__ __forceinline__ u32 key_of(float value) {
  const u32 bits = __float_as_uint(value + 0.f);  // −0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Row {
  const float* logits;
  int vocab;
  float temperature, best;
  __device__ float value(int i) const { return logits[i] / temperature; }
  __device__ u64 weight(float value) const { return (u64)(expf(value - best) * ONE + 0.5f); }
};

struct Found {
  u64 bins[BINS], chunks[BINS / PER_CHUNK], above;
  u32 low, high;
  int bin;
};

// The interval of a value; keys in [low, high]. `shift` < 0: by distance from the best.
__device__ __forceinline__ int bin_of(const Row& row, float value, u32 key, u32 high, int shift) {
  if (shift >= 0) return (high - key) >> shift;
  const float distance = (row.best - value) * FIRST_WIDTH;
  return distance < BINS - 1 ? (int)distance : BINS - 1;
}

// The largest key such that the tokens between it and the best, of those not below `least`, number `goal`, or weigh it; `least` if there are
// fewer. All threads call it and get the same.
__device__ u32 reach(const Row& row, u32 least, bool weighed, u64 goal, Found& f) {
  const int tid = threadIdx.x;
  u32 low = least, high = key_of(row.best);
  u64 above = 0;
  for (int shift = -1;;) {
    for (int i = tid; i < BINS; i += blockDim.x) f.bins[i] = 0;
    if (tid == 0) f.low = 0xffffffffu, f.high = 0, f.bin = -1;
    __syncthreads();
    for (int i = tid; i < row.vocab; i += blockDim.x) {
      const float value = row.value(i);
      const u32 key = key_of(value);
      if (key >= low && key <= high) atomicAdd(f.bins + bin_of(row, value, key, high, shift), weighed ? row.weight(value) : 1ull);
    }
    __syncthreads();
    for (int i = tid; i < BINS / PER_CHUNK; i += blockDim.x) {
      u64 sum = 0;
      for (int j = 0; j < PER_CHUNK; ++j) sum += f.bins[i * PER_CHUNK + j];
      f.chunks[i] = sum;
    }
    __syncthreads();
    if (tid == 0) {
      int chunk = 0;
      while (chunk < BINS / PER_CHUNK && above + f.chunks[chunk] < goal) above += f.chunks[chunk++];
      if (chunk < BINS / PER_CHUNK) {
        int bin = chunk * PER_CHUNK;
        while (above + f.bins[bin] < goal) above += f.bins[bin++];
        f.bin = bin;
        f.above = above;
      }
    }
    __syncthreads();
    const int bin = f.bin;
    if (bin < 0) return least;
    if (shift == 0) return high - bin;
    above = f.above;
    u32 from = 0xffffffffu, to = 0;
    for (int i = tid; i < row.vocab; i += blockDim.x) {
      const float value = row.value(i);
      const u32 key = key_of(value);
      if (key < low || key > high || bin_of(row, value, key, high, shift) != bin) continue;
      from = min(from, key);
      to = max(to, key);
    }
    atomicMin(&f.low, from);
    atomicMax(&f.high, to);
    __syncthreads();
    low = f.low;
    high = f.high;
    __syncthreads();
    if (low == high) return low;
    shift = max(0, 21 - __clz(high - low));  // 2,048 intervals cover high − low
  }
}

// One block a row of `rows`. logits [n, vocab]: −∞ is put in place of what is not left. log_min_p −∞, top_k 0, top_p 1: off. A row with a NaN,
// and one with nothing to choose from, stays as it is.
extern "C" __global__ void __launch_bounds__(1024)
filter(float* logits, int vocab, const long long* rows, const float* temperature, const float* log_min_p, const int* top_k,
       const float* top_p) {
  __shared__ Found f;
  __shared__ u32 best;
  __shared__ u64 total;
  const int tid = threadIdx.x, which = blockIdx.x;
  float* mine = logits + (u64)rows[which] * vocab;
  Row row = {mine, vocab, temperature[which], 0.f};

  if (tid == 0) best = 0, total = 0;
  __syncthreads();
  u32 most = 0;
  for (int i = tid; i < vocab; i += blockDim.x) {
    const float value = row.value(i);
    most = max(most, value == value ? key_of(value) : 0xffffffffu);
  }
  atomicMax(&best, most);
  __syncthreads();
  const u32 first = best;
  row.best = __uint_as_float(first & 0x80000000u ? first & 0x7fffffffu : ~first);
  if (first == 0xffffffffu || fabsf(row.best) == __uint_as_float(0x7f800000u)) return;

  u32 least = key_of(row.best + log_min_p[which]);
  if (top_k[which] > 0) least = reach(row, least, false, top_k[which], f);
  const float p = top_p[which];
  if (p < 1.f) {
    u64 sum = 0;
    for (int i = tid; i < vocab; i += blockDim.x) {
      const float value = row.value(i);
      if (key_of(value) >= least) sum += row.weight(value);
    }
    atomicAdd(&total, sum);
    __syncthreads();
    least = reach(row, least, true, max((u64)1, (u64)ceil((double)p * (double)total)), f);
  }
  for (int i = tid; i < vocab; i += blockDim.x)
    if (key_of(row.value(i)) < least) mine[i] = __uint_as_float(0xff800000u);
}
