// How a token is chosen from logits: by the largest score.

// 32 random bits for a token at the position with the noise key `key`: the finaliser of SplitMix64
// (Steele et al. 2014).
__device__ __forceinline__ u32 hash(u64 key, u32 token) {
  u64 z = key + 0x9e3779b97f4a7c15ull * (u64)(token + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (u32)((z ^ (z >> 31)) >> 32);
}

// Gumbel noise from 23 random bits: with 24, adding one half would round the largest up to 1. It is
// at least MIN_NOISE and at most max_noise(bits) <= MAX_NOISE.
#define MIN_NOISE -2.82f
#define MAX_NOISE 16.65f
__device__ __forceinline__ float noise(u32 bits) {
  float uniform = ((float)bits + 0.5f) * (1.f / 8388608.f);
  return -logf(-logf(uniform));
}
// -log(-log(u)) <= -log(1 - u), where 1 - u is at least half the power of two that it begins with.
__device__ __forceinline__ float max_noise(u32 bits) { return 0.6931472f * (__clz(8388608u - bits) - 7) + 1e-2f; }

// The token with the largest score is sampled: the score is the logit itself for greedy decoding
// (inverse_temperature 0), or else the logit with Gumbel noise, which makes the maximum a sample of
// the softmax.
__device__ __forceinline__ float sampling_score(float logit, float inverse_temperature, u64 key, int token) {
  if (inverse_temperature == 0.f) return logit;
  return logit * inverse_temperature + noise(hash(key, (u32)token) >> 9);
}

// The id where there is no token. It loses against all others.
#define NO_TOKEN 0x7fffffff

// Ties go to the lower id. A NaN never wins.
__device__ __forceinline__ bool is_better(float score, int id, float best, int best_id) {
  return score > best || (score == best && id < best_id);
}

// Every one of `lanes` neighbouring lanes gets the best score among them.
__device__ __forceinline__ void warp_argmax(int lanes, float &best, int &best_id) {
  for (int step = lanes / 2; step > 0; step >>= 1) {
    float score = __shfl_xor_sync(0xffffffffu, best, step);
    int id = __shfl_xor_sync(0xffffffffu, best_id, step);
    if (is_better(score, id, best, best_id)) best = score, best_id = id;
  }
}

// Thread 0 gets the best score among the threads of a block.
__device__ __forceinline__ void block_argmax(float &best, int &best_id) {
  __shared__ float scores[32];
  __shared__ int ids[32];
  warp_argmax(32, best, best_id);
  if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = best, ids[threadIdx.x / 32] = best_id;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < blockDim.x / 32; w++)
      if (is_better(scores[w], ids[w], best, best_id)) best = scores[w], best_id = ids[w];
}

// A sum of exp(score - from) becomes one of exp(score - to).
__device__ __forceinline__ float rescaled(float sum, float from, float to) {
  return sum == 0.f ? 0.f : sum * __expf(from - to);
}

// The best of some scores with their ids, in descending order, and what the softmax of all of them
// needs: the sum of exp(score - scores[0]).
struct Candidates {
  float scores[MAX_CANDIDATES], sum = 0.f;
  int ids[MAX_CANDIDATES];

  __device__ __forceinline__ Candidates() {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) scores[r] = -INFINITY, ids[r] = NO_TOKEN;
  }

  // Leaves the sum as it is.
  __device__ __forceinline__ void insert(float score, int id) {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++)
      if (is_better(score, id, scores[r], ids[r])) {
        const float next = scores[r];
        const int next_id = ids[r];
        scores[r] = score, ids[r] = id;
        score = next, id = next_id;
      }
  }

  // Adds the best of some scores, and their sum of exp(score - best).
  __device__ __forceinline__ void add(float best, int id, float best_sum) {
    const float max = fmaxf(best, scores[0]);
    sum = rescaled(sum, scores[0], max) + rescaled(best_sum, best, max);
    insert(best, id);
  }

  __device__ __forceinline__ void remove_first() {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES - 1; r++) scores[r] = scores[r + 1], ids[r] = ids[r + 1];
    scores[MAX_CANDIDATES - 1] = -INFINITY, ids[MAX_CANDIDATES - 1] = NO_TOKEN;
  }
};

// A number that is larger for larger scores, and the score of such a number.
__device__ __forceinline__ u32 rank_of(float score) {
  const u32 bits = __float_as_uint(score + 0.f);  // not -0, which equals 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(u32 rank) {
  return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}

// Every lane gets the candidates among those of a warp.
__device__ __forceinline__ void warp_candidates(Candidates &candidates) {
  Candidates rest = candidates;
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++) {
    const u32 rank = rank_of(rest.scores[0]), max = __reduce_max_sync(0xffffffffu, rank);
    candidates.scores[r] = score_of(max);
    candidates.ids[r] = __reduce_min_sync(0xffffffffu, rank == max ? rest.ids[0] : NO_TOKEN);
    if (r == 0) candidates.sum = warp_sum(rescaled(rest.sum, rest.scores[0], candidates.scores[0]));
    if (rest.ids[0] == candidates.ids[r]) rest.remove_first();
  }
}

// The candidates among MAX_CANDIDATES scores of each lane, without a sum. A score of -INFINITY has no
// token.
__device__ __forceinline__ Candidates warp_candidates(const float (&scores)[MAX_CANDIDATES],
                                                      const int (&ids)[MAX_CANDIDATES]) {
  Candidates candidates;
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++)
    candidates.insert(scores[r], scores[r] > -INFINITY ? ids[r] : NO_TOKEN);
  warp_candidates(candidates);
  return candidates;
}

// The first warp gets the candidates among those of all threads of a block.
__device__ __forceinline__ void block_candidates(Candidates &candidates) {
  __shared__ float scores[MAX_CANDIDATES][32], sums[32];
  __shared__ int ids[MAX_CANDIDATES][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  warp_candidates(candidates);
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) scores[r][warp] = candidates.scores[r], ids[r][warp] = candidates.ids[r];
    sums[warp] = candidates.sum;
  }
  __syncthreads();
  if (warp > 0) return;
  candidates = Candidates();
  if (lane < blockDim.x / 32) {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) candidates.scores[r] = scores[r][lane], candidates.ids[r] = ids[r][lane];
    candidates.sum = sums[lane];
  }
  warp_candidates(candidates);
}
