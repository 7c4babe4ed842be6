// What min-p, top-k and top-p leave of a row's logits: `filter_logits` of gpu_worker/sampler.py, which says what they mean.
//
// The k-th value, or the last value of the smallest set that holds a share p, is found without sorting (as a radix select is, but by
// weights as well as by counts): a histogram of what is left over 2,048 intervals of values, the interval in which the goal is reached, and
// again within that, until one value is left. Weights are summed as integers, so that the order of the sums does not matter.
//
// Logits are compared as keys: unsigned integers in the order of the floats. Filters are about logits / temperature, whose order is
// the same; where two logits become equal by it, both stay or both go.
typedef unsigned int u32;
typedef unsigned long long u64;

#define BINS 2048
#define PER_CHUNK 32
#define CHUNKS (BINS / PER_CHUNK)
#define INTERVALS 64.f   // of the first histogram in a scaled distance of 1 from the best; the last takes the rest
#define ONE 0x1p45f      // weight of the best token; 2^18 of them fit
#define WEIGHTLESS 32.f  // e^-32 · ONE is less than a half

__device__ __forceinline__ u32 key_of(float value) {
  const u32 bits = __float_as_uint(value + 0.f);  // −0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// A sum of 64 bits as two words: shared memory adds words natively, and anything longer by trying again.
struct Sum {
  u32 low, high;
  __device__ void add(u64 more) {
    const u32 word = (u32)more, before = atomicAdd(&low, word), rest = (u32)(more >> 32) + (before + word < before);
    if (rest) atomicAdd(&high, rest);
  }
  __device__ u64 value() const { return (u64)high << 32 | low; }
};

struct Row {
  const float* logits;
  int vocab;
  float temperature, best;  // the largest logit
  __device__ float scaled(float logit) const { return logit / temperature; }
  __device__ float distance(float logit) const { return (best - logit) * (1.f / temperature); }
  __device__ u64 weight(float logit) const { return (u64)(expf(scaled(logit) - scaled(best)) * ONE + 0.5f); }
};

// All of a row's logits, by all threads: `take` of each. Four at a time and sixteen of a thread under way, since a block has an SM's share of
// the memory's latency alone to wait for.
template <class Take> __device__ __forceinline__ void each(const Row& row, Take take) {
  const int fours = (u64)row.logits % sizeof(float4) ? 0 : row.vocab / 4;
  const float4* four = (const float4*)row.logits;
#pragma unroll 4
  for (int i = threadIdx.x; i < fours; i += blockDim.x) {
    const float4 v = four[i];
    take(4 * i, v.x), take(4 * i + 1, v.y), take(4 * i + 2, v.z), take(4 * i + 3, v.w);
  }
  for (int i = 4 * fours + threadIdx.x; i < row.vocab; i += blockDim.x) take(i, row.logits[i]);
}

struct Found {
  Sum bins[BINS];
  u64 chunks[CHUNKS], above;
  u32 low, high;
  int bin;
};

// The interval of a logit with a key in [low, high]. `shift` < 0: by distance from the best.
__device__ __forceinline__ int bin_of(const Row& row, float logit, u32 key, u32 high, int shift) {
  if (shift >= 0) return (high - key) >> shift;
  const float at = row.distance(logit) * INTERVALS;
  return at < BINS - 1 ? (int)at : BINS - 1;
}

// The largest key such that the tokens from it to the best, of those not below `least`, number k or, if k is 0, hold the share p of the
// weight of all; `least` if there are fewer. All threads call it and get the same.
__device__ u32 reach(const Row& row, u32 least, u64 k, float p, Found& f) {
  const int tid = threadIdx.x;
  u32 low = least, high = key_of(row.best);
  u64 above = 0, goal = k;  // used by the first thread
  for (int shift = -1;;) {
    for (int i = tid; i < BINS; i += blockDim.x) f.bins[i] = {0, 0};
    if (tid == 0) f.low = 0xffffffffu, f.high = 0, f.bin = -1;
    __syncthreads();
    each(row, [&](int, float logit) {
      const u32 key = key_of(logit);
      if (key < low || key > high || !k && row.distance(logit) > WEIGHTLESS + 1.f) return;
      const int bin = bin_of(row, logit, key, high, shift);
      if (shift < 0 && bin == BINS - 1 && k) return;  // most of a vocabulary, perhaps, and seldom needed: counted in the next round
      const u64 more = k ? 1 : row.weight(logit);
      if (more) f.bins[bin].add(more);
    });
    __syncthreads();
    for (int i = tid; i < CHUNKS; i += blockDim.x) {
      u64 sum = 0;
      for (int j = 0; j < PER_CHUNK; ++j) sum += f.bins[i * PER_CHUNK + j].value();
      f.chunks[i] = sum;
    }
    __syncthreads();
    if (tid == 0) {
      if (!goal) {
        u64 all = 0;
        for (int i = 0; i < CHUNKS; ++i) all += f.chunks[i];
        goal = max((u64)1, (u64)ceil((double)p * (double)all));
      }
      int chunk = 0;
      while (chunk < CHUNKS && above + f.chunks[chunk] < goal) above += f.chunks[chunk++];
      if (chunk < CHUNKS) {
        int bin = chunk * PER_CHUNK;
        while (above + f.bins[bin].value() < goal) above += f.bins[bin++].value();
        f.bin = bin;
      } else if (shift < 0) {
        f.bin = BINS - 1;
      }
    }
    __syncthreads();
    const int bin = f.bin;
    if (bin < 0) return least;
    if (shift == 0) return high - bin;
    u32 from = 0xffffffffu, to = 0;
    each(row, [&](int, float logit) {
      const u32 key = key_of(logit);
      if (key < low || key > high || bin_of(row, logit, key, high, shift) != bin) return;
      from = min(from, key);
      to = max(to, key);
    });
    atomicMin(&f.low, from);
    atomicMax(&f.high, to);
    __syncthreads();
    low = f.low;
    high = f.high;
    __syncthreads();
    if (low > high) return least;
    if (low == high && shift >= 0) return low;
    shift = low == high ? 0 : max(0, 21 - __clz(high - low));  // 2,048 intervals cover high − low
  }
}

// The least key of a token that, over the temperature, is not below `bound`.
__device__ u32 floor_of(const Row& row, float bound, Found& f) {
  const int tid = threadIdx.x;
  if (tid == 0) f.low = 0xffffffffu;
  __syncthreads();
  u32 mine = 0xffffffffu;
  each(row, [&](int, float logit) {
    if (row.scaled(logit) >= bound) mine = min(mine, key_of(logit));
  });
  atomicMin(&f.low, mine);
  __syncthreads();
  const u32 least = f.low;
  __syncthreads();
  return least;
}

// One block a row of `rows`. logits [n, vocab]: −∞ is put in place of what is not left. log_min_p −∞, top_k 0, top_p 1: off. A row with a NaN,
// and one with nothing to choose from, stays as it is.
extern "C" __global__ void __launch_bounds__(1024)
filter(float* logits, int vocab, const long long* rows, const float* temperature, const float* log_min_p, const int* top_k,
       const float* top_p) {
  __shared__ Found f;
  __shared__ u32 most;
  const int tid = threadIdx.x, which = blockIdx.x;
  float* mine = logits + (u64)rows[which] * vocab;
  Row row = {mine, vocab, temperature[which], 0.f};

  if (tid == 0) most = 0;
  __syncthreads();
  u32 seen = 0;
  each(row, [&](int, float logit) { seen = max(seen, logit == logit ? key_of(logit) : 0xffffffffu); });
  atomicMax(&most, seen);
  __syncthreads();
  row.best = value_of(most);
  if (most == 0xffffffffu || fabsf(row.best) == __uint_as_float(0x7f800000u)) return;

  float bound = row.scaled(row.best) + log_min_p[which];
  if (top_k[which] > 0) bound = row.scaled(value_of(reach(row, floor_of(row, bound, f), top_k[which], 1.f, f)));
  if (top_p[which] < 1.f) bound = row.scaled(value_of(reach(row, floor_of(row, bound, f), 0, top_p[which], f)));
  each(row, [&](int i, float logit) {
    if (row.scaled(logit) < bound) mine[i] = __uint_as_float(0xff800000u);
  });
}
