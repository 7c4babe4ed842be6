// A step's inputs, built on the device from the plan's columns (mapped pinned memory) and the slot table.
//
// Ring entry (int32 words): a header of 16, the rows, then the columns at the offsets the header names. `state.py` writes it.
//   header: 0 rows, 1 tokens, 2 outputs, 3 assignments, 4 bindings, 5 result entry, 7 tiles, 8 logit rows,
//           offsets: 9 copies, 10 assignments, 11 bindings, 12 outputs, 13 tokens, 14 tiles, 15 logit rows
//   row: slot, first position, count, known tokens, offset among the step's tokens, offset among the known tokens, first known token, 0
//   assignment: slot, index, block, 0     binding: slot, then 31 words of parameters (`sampler.cu`)
//   output: row of the logits, slot, position, 0     tile: row, first token in the row     logit row: token of the step
//   copy: from, to
#include "common.cuh"
#include "work_list.cuh"

struct Slots {        // rows of the tables: slots + 1; the last one is the dummy, whose table names the dummy page only
  int* table;         // [slots + 1, width] blocks
  int* parameters;    // [slots + 1, 32]
  int* last_token;    // [slots + 1]
  int* dead;          // [slots + 1]
  int slots, width;
};
struct Inputs {       // what the step's kernels read
  int4* rows;         // [rows, 2] as in the ring entry, dead rows on the dummy slot at position 0
  int4* outputs;      // [rows]
  int* tokens;        // [tokens] ids
  int* positions;     // [tokens]
  int* places;        // [tokens] block * block_size + offset, where K and V go
  int* tiles;         // [tiles, 2] of the prefill attention
  int* logit_rows;    // [rows]
  int4* items;        // [items, 2] of the decode attention
  int* step;          // 0 ring position (counts up), 1 entry in use, 2 result entry, 3 outputs
};

__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// One block. Applies assignments and bindings, then builds rows and outputs; for a decode step (every row one token and one output;
// `bucket` rows launched) tokens, positions and the attention's work list as well. The entry lies across the bus: what does not
// depend on one another is asked for at once. Where more rows, tokens or tiles are launched than the step has, as a captured graph does,
// the rest are empty rows, tokens that go to the dummy block, and tiles of row -1.
extern "C" __global__ void __launch_bounds__(1024)
prepare(Slots s, Inputs in, const int* ring, int entry_words, int entries, u64* results, int result_words, int bucket, int max_items,
        int spread, int least, int limit, int block_size, int decode, int tokens_launched, int tiles_launched, int dummy_block) {
  __shared__ int scratch[32];
  __shared__ int header[16];
  const int tid = threadIdx.x, used = in.step[0] % entries;
  const int* e = ring + (u64)used * entry_words;
  int4 a = make_int4(s.slots, 0, 1, 0), b = make_int4(tid, 0, 0, 0);
  if (tid < bucket) {  // beyond the rows: whatever an earlier step left, not used
    a = ((const int4*)(e + 16))[2 * tid];
    b = ((const int4*)(e + 16))[2 * tid + 1];
  }
  if (tid < 16) header[tid] = e[tid];
  __syncthreads();
  const int rows = header[0];
  if (tid == 0) {
    in.step[0] += 1;
    in.step[1] = used;
    in.step[2] = header[5];
    in.step[3] = header[2];
    results[(u64)header[5] * result_words] = nanoseconds();
  }
  const int4* assignments = (const int4*)(e + header[10]);
  for (int i = tid; i < header[3]; i += blockDim.x) {
    const int4 v = assignments[i];
    s.table[(u64)v.x * s.width + v.y] = v.z;
  }
  const int* bindings = e + header[11];
  for (int i = tid; i < header[4] * 32; i += blockDim.x) {
    const int slot = bindings[i & ~31], word = bindings[i];
    if (i & 31) s.parameters[slot * 32 + (i & 31)] = word;
    else s.dead[slot] = 0;
  }
  if (!decode) {
    const int* tiles = e + header[14];
    for (int i = tid; i < tiles_launched * 2; i += blockDim.x) in.tiles[i] = i < header[7] * 2 ? tiles[i] : -1;
    const int* logit_rows = e + header[15];
    if (tid < bucket) in.logit_rows[tid] = tid < header[8] ? logit_rows[tid] : 0;
    for (int i = header[1] + tid; i < tokens_launched; i += blockDim.x) {
      in.tokens[i] = 0;
      in.positions[i] = 0;
      in.places[i] = dummy_block * block_size;
    }
    if (tid < bucket) in.outputs[tid] = tid < header[2] ? ((const int4*)(e + header[12]))[tid] : make_int4(0, -1, 0, 0);
  }
  __syncthreads();

  int position = 0, slot = s.slots;
  if (tid < bucket) {
    if (tid >= rows) {
      a = make_int4(s.slots, 0, decode, 0);
      b = make_int4(tid, 0, 0, 0);
    }
    if (decode) in.outputs[tid] = make_int4(tid, tid < rows ? a.x : -1, a.y + 1, 0);
    if (s.dead[a.x]) {  // still runs, harmlessly
      a.x = s.slots;
      if (decode) a.y = 0;
    }
    in.rows[2 * tid] = a;
    in.rows[2 * tid + 1] = b;
    slot = a.x;
    position = a.y;
    if (decode) {
      in.tokens[tid] = tid < rows ? (a.w ? b.z : s.last_token[slot]) : 0;
      in.positions[tid] = position;
      in.places[tid] = s.table[(u64)slot * s.width + position / block_size] * block_size + position % block_size;
      in.logit_rows[tid] = tid;
    }
  }
  if (decode) work_list(in.items, max_items, bucket, slot, position, spread, least, limit, s.table, s.width, block_size, scratch);
}

// Tokens, positions and places of rows with any number of tokens; grid (rows, parts).
extern "C" __global__ void expand(Slots s, Inputs in, const int* ring, int entry_words, int block_size) {
  pdl_wait();
  pdl_trigger();
  const int* e = ring + (u64)in.step[1] * entry_words;
  const int4 a = in.rows[2 * blockIdx.x], b = in.rows[2 * blockIdx.x + 1];
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < a.z; i += gridDim.y * blockDim.x) {
    const int position = a.y + i;
    in.tokens[b.x + i] = i < a.w ? e[e[13] + b.y + i] : s.last_token[a.x];
    in.positions[b.x + i] = position;
    in.places[b.x + i] = s.table[(u64)a.x * s.width + position / block_size] * block_size + position % block_size;
  }
}

// Copies whole blocks, on the card or to and from mapped host memory; grid (copies, layers); `first`: the first of the entry's copies.
// Caches: [layers][blocks][vectors] of 16 bytes.
extern "C" __global__ void copy_blocks(Inputs in, const int* ring, int entry_words, int first, const uint4* source, int source_blocks,
                                       uint4* target, int target_blocks, int vectors) {
  const int* e = ring + (u64)in.step[1] * entry_words;
  const int* copy = e + e[9] + 2 * (first + blockIdx.x);
  const uint4* from = source + ((u64)blockIdx.y * source_blocks + copy[0]) * vectors;
  uint4* to = target + ((u64)blockIdx.y * target_blocks + copy[1]) * vectors;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) to[i] = from[i];
}

// The end of a step without outputs: its time.
extern "C" __global__ void mark(Inputs in, u64* results, int result_words) {
  pdl_wait();
  pdl_trigger();
  results[(u64)in.step[2] * result_words + 1] = nanoseconds();
}
