// The work list of decode attention, which `prepare` makes from the rows' positions: tiles of 64 cached tokens, cut into items of equal size.
//
// A row gets ceil(tiles / chunk) items, at least one. Item: row, first, end, splits, own partial, row's first partial, slot, position.
//
// With PACK > 1 neighbouring rows whose block tables begin alike make groups of up to PACK rows. What a group has in common is cut once,
// for all of its rows; what a row has behind it, as ever. Item of a group: first row, first, end, 0, index of the span, first own item of
// the first row, slot, rows. These items stand first, since they are the longest; then the first own item of each row, in the order of the
// rows, where the kernel finds a group's positions and partials; then the rest. A row's partials are its group's and then its own.
#ifndef PACK
#define PACK 1
#endif
#define LEAST_SHARED 128  // tokens: what a group must save to be worth its partial results

// Exclusive prefix sum over the block (1,024 threads at most); *total is the sum. Ends with a barrier.
__device__ __forceinline__ int prefix_sum(int v, int* scratch, int* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int run = v;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int up = __shfl_up_sync(0xffffffffu, run, d);
    if (lane >= d) run += up;
  }
  if (lane == 31) scratch[warp] = run;
  __syncthreads();
  int before = 0, sum = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) {
    if (i < warp) before += scratch[i];
    sum += scratch[i];
  }
  __syncthreads();
  *total = sum;
  return before + run - v;
}

__device__ __forceinline__ int tiles_of(int tokens) { return max((tokens + 63) / 64, 1); }

// Tiles of an item; `bound`: sum of the rows' tiles, from which `limit` keeps the partial results' memory.
__device__ __forceinline__ int chunk_of(int all, int bound, int spread, int least, int limit) {
  return max(min(max(least, (all + spread - 1) / spread), 16), (bound + limit - 1) / limit);
}

// Tiles of an item, where `tiles` are cut into items of at most `chunk`; none of them is empty.
__device__ __forceinline__ int even_share(int tiles, int chunk) {
  const int wanted = (tiles + chunk - 1) / chunk;
  return wanted ? (tiles + wanted - 1) / wanted : 1;
}

#if PACK == 1

// By all threads of the block, one a row; those from `bucket` on have none. Items left up to `max_items` are no row's.
__device__ __forceinline__ void work_list(int4* list, int max_items, int bucket, int slot, int position, int spread, int least, int limit,
                                          const int* table, int width, int block_size, int* scratch) {
  const int row = threadIdx.x, tiles = row < bucket ? tiles_of(position) : 0;
  int all, items;
  prefix_sum(tiles, scratch, &all);
  const int share = even_share(tiles, chunk_of(all, all, spread, least, limit));
  const int splits = (tiles + share - 1) / share;  // none is empty: only one item may end at the row's position
  const int first = prefix_sum(splits, scratch, &items);
  if (row < bucket) {
    const int per = share * 64;
    for (int i = 0; i < splits; ++i) {
      list[2 * (first + i)] = make_int4(row, min(i * per, position), min((i + 1) * per, position), splits);
      list[2 * (first + i) + 1] = make_int4(first + i, first, slot, position);
    }
  }
  for (int i = items + row; i < max_items; i += blockDim.x) list[2 * i] = make_int4(-1, 0, 0, 1);
}

#else

// Tokens in blocks that two tables have in common from their beginning, of `tokens` cached in both. Called by a whole warp.
__device__ __forceinline__ int shared_tokens(const int* one, const int* other, int tokens, int block_size) {
  const int lane = threadIdx.x & 31, blocks = tokens / block_size;
  for (int base = 0; base < blocks; base += 128) {
    bool differs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // all asked for before any is waited for
      const int i = base + 32 * k + lane;
      differs[k] = i >= blocks || one[i] != other[i];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 where = __ballot_sync(0xffffffffu, differs[k]);
      if (where) return (base + 32 * k + __ffs(where) - 1) * block_size;
    }
  }
  return blocks * block_size;
}

struct Group {
  int leader, rows, tokens;  // first row; rows and tokens that they share, 0 if it is one row
};

// The group of row `row`. A run of rows, each sharing enough with the one before it, is cut into groups from its beginning.
__device__ __forceinline__ Group group_of(const int* table, int width, int block_size, int row, int bucket, int slot, int position,
                                          int* scratch) {
  __shared__ int slots[1024], positions[1024], shared[1024], first_of_run[1024];
  slots[row] = slot;
  positions[row] = position;
  __syncthreads();
  for (int i = row >> 5; i < bucket; i += blockDim.x >> 5) {
    const int* mine = table + (u64)slots[i] * width;
    const int* before = table + (u64)slots[max(i - 1, 0)] * width;
    const int tokens = i ? shared_tokens(mine, before, min(positions[i], positions[i - 1]), block_size) : 0;
    if ((row & 31) == 0) shared[i] = tokens >= LEAST_SHARED ? tokens : 0;
  }
  __syncthreads();
  const int begins = row < bucket && !shared[row];
  int runs;
  const int run = prefix_sum(begins, scratch, &runs) + begins - 1;
  if (begins) first_of_run[run] = row;
  __syncthreads();
  Group g = {row, 1, 0};
  if (row >= bucket) return g;
  g.leader = row - (row - first_of_run[run]) % PACK;
  for (; g.rows < PACK && g.leader + g.rows < bucket && shared[g.leader + g.rows]; ++g.rows)
    g.tokens = g.rows == 1 ? shared[g.leader + 1] : min(g.tokens, shared[g.leader + g.rows]);
  return g;
}

// As above.
__device__ __forceinline__ void work_list(int4* list, int max_items, int bucket, int slot, int position, int spread, int least, int limit,
                                          const int* table, int width, int block_size, int* scratch) {
  const int row = threadIdx.x;
  const Group g = group_of(table, width, block_size, row, bucket, slot, position, scratch);
  const bool leads = g.tokens && g.leader == row;
  const int own = position - g.tokens, tiles = row < bucket ? tiles_of(own) : 0, common_tiles = (g.tokens + 63) / 64;
  int all, bound, groups, others, partials;
  prefix_sum(tiles + (leads ? common_tiles : 0), scratch, &all);
  prefix_sum(row < bucket ? tiles_of(position) : 0, scratch, &bound);
  const int chunk = chunk_of(all, bound, spread, least, limit);
  const int share = even_share(tiles, chunk), splits = (tiles + share - 1) / share, per = share * 64;
  const int common_share = even_share(common_tiles, chunk), common_splits = (common_tiles + common_share - 1) / common_share;
  const int of_group = prefix_sum(leads ? common_splits : 0, scratch, &groups);
  const int further = prefix_sum(row < bucket ? splits - 1 : 0, scratch, &others);
  const int first = prefix_sum(row < bucket ? common_splits + splits : 0, scratch, &partials);
  if (leads) {
    const int per_common = common_share * 64;
    for (int i = 0; i < common_splits; ++i) {
      list[2 * (of_group + i)] = make_int4(row, i * per_common, min((i + 1) * per_common, g.tokens), 0);
      list[2 * (of_group + i) + 1] = make_int4(i, groups + row, slot, g.rows);
    }
  }
  if (row < bucket) {
    for (int i = 0; i < splits; ++i) {
      int4* item = list + 2 * (i ? groups + bucket + further + i - 1 : groups + row);
      item[0] = make_int4(row, g.tokens + min(i * per, own), g.tokens + min((i + 1) * per, own), common_splits + splits);
      item[1] = make_int4(first + common_splits + i, first, slot, position);
    }
  }
  for (int i = groups + bucket + others + row; i < max_items; i += blockDim.x) list[2 * i] = make_int4(-1, 0, 0, 1);
}

#endif
