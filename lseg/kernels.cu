// What stands around the image encoder on the GPU: photos to windows, and z, the head's output, to labels.
//
// No shared memory, no atomics, no library: each thread owns what it writes, so that every run gives the same bits, and
// the tests run this very file on a CPU. `python -m lseg.nvrtc` compiles it to kernels.ptx, which the driver loads.
//
// Letters: B images, D channels of an embedding, N texts; z is [B, D, s, s]. "Wide" is the grid of the embeddings,
// 2s x 2s; "full" the network's own, 4s x 4s. Resizing is bilinear, the corners of both grids coinciding.

#if defined(__CUDA_ARCH__)
#define EACH(axis) (blockIdx.axis * blockDim.axis + threadIdx.axis)
#endif

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};

__device__ inline float value(float x) { return x; }
__device__ inline float value(Bfloat x) {
    union {
        unsigned int bits;
        float number;
    } wide;
    wide.bits = (unsigned int)x.bits << 16;
    return wide.number;
}
__device__ inline void put(float *to, float x) { *to = x; }
__device__ inline void put(Bfloat *to, float x) {
    union {
        float number;
        unsigned int bits;
    } wide;
    wide.number = x;
    to->bits = (unsigned short)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);  // to the nearest even
}
#if defined(__CUDA_ARCH__)
__device__ inline float value(Half x) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(x.bits));
    return number;
}
__device__ inline void put(Half *to, float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    to->bits = bits;
}
#endif

// The two neighbours of a place along an axis of `source` when it is resized to `target`, and the second one's weight.
struct Tap {
    int first, second;
    float weight;
};

__device__ inline Tap tap(unsigned int at, unsigned int source, unsigned int target) {
    unsigned int last = target > 1 ? target - 1 : 1;
    unsigned int place = at * (source - 1);  // below 2^32 for sides below 65536
    Tap result;
    result.first = place / last;
    result.second = min((unsigned int)result.first + 1, source - 1);
    result.weight = (float)(place % last) / (float)last;
    return result;
}

// Windows of `size` x `size` out of photos uint8 [.., H, W, 3], resized to h x w and normalised to -1 .. 1.
// places: int32 [B, 4], each window's photo, top, left, and whether it is mirrored; beyond the photo it is black.
extern "C" __global__ void cut_windows(const unsigned char *photos, int H, int W, int h, int w, const int *places,
                                       int size, float *images) {
    int x = EACH(x), y = EACH(y), b = EACH(z);
    if (x >= size) return;
    const int *place = places + 4 * b;
    int row = place[1] + y, column = place[2] + (place[3] ? size - 1 - x : x);
    float *image = images + ((long long)b * 3 * size + y) * size + x;
    bool inside = row < h && column < w;
    Tap down = tap(inside ? row : 0, H, h), across = tap(inside ? column : 0, W, w);
    const unsigned char *photo = photos + (long long)place[0] * H * W * 3;
    const unsigned char *upper = photo + (long long)down.first * W * 3, *lower = photo + (long long)down.second * W * 3;
    for (int channel = 0; channel < 3; ++channel) {
        int left = across.first * 3 + channel, right = across.second * 3 + channel;
        float a = upper[left] + (lower[left] - upper[left]) * down.weight;
        float c = upper[right] + (lower[right] - upper[right]) * down.weight;
        image[channel * size * size] = inside ? (a + (c - a) * across.weight) * (2.0f / 255) - 1 : -1.0f;
    }
}

// What the lengths of upsampled z follow from: the products, over a group of channels, of each place's vector with
// itself, its right and lower neighbours and the one beyond both, and of these two: float32 [groups, 5, B, s, s].
template <typename T>
__device__ inline void products(const T *z, int D, int s, int group, float *sums) {
    int place = EACH(x), g = EACH(y), b = EACH(z), area = s * s;
    if (place >= area) return;
    int right = place % s + 1 < s ? 1 : 0, below = place / s + 1 < s ? s : 0;
    int last = min((g + 1) * group, D);
    float own = 0, beside = 0, under = 0, falling = 0, rising = 0;
    const T *at = z + ((long long)b * D + g * group) * area + place;
#pragma unroll 4
    for (int channel = g * group; channel < last; ++channel, at += area) {
        float a = value(at[0]), c = value(at[right]), e = value(at[below]), f = value(at[below + right]);
        own += a * a;
        beside += a * c;
        under += a * e;
        falling += a * f;
        rising += c * e;
    }
    long long step = (long long)gridDim.z * area;
    float *to = sums + 5 * g * step + (long long)b * area + place;
    to[0] = own;
    to[step] = beside;
    to[2 * step] = under;
    to[3 * step] = falling;
    to[4 * step] = rising;
}

// One over the lengths of upsampled z, float32 [B, 2s, 2s]: a weighted sum of four vectors, so its square is one of
// the products of each two.
extern "C" __global__ void inverse_lengths(const float *sums, int groups, int s, float *inverse) {
    int wide = 2 * s, pixel = EACH(x), b = EACH(y), area = s * s;
    if (pixel >= wide * wide) return;
    Tap down = tap(pixel / wide, s, wide), across = tap(pixel % wide, s, wide);
    float a = (1 - down.weight) * (1 - across.weight), c = (1 - down.weight) * across.weight;
    float e = down.weight * (1 - across.weight), f = down.weight * across.weight;
    int right = across.second - across.first, below = (down.second - down.first) * s;
    long long step = (long long)gridDim.y * area;
    const float *own = sums + (long long)b * area + down.first * s + across.first;
    float sum = 0;
    for (int g = 0; g < groups; ++g, own += 5 * step) {
        const float *beside = own + step, *under = own + 2 * step;
        sum += a * a * own[0] + c * c * own[right] + e * e * own[below] + f * f * own[below + right];
        sum += 2 * (a * c * beside[0] + e * f * beside[below] + a * e * under[0] + c * f * under[right]);
        sum += 2 * (a * f * own[3 * step] + c * e * own[4 * step]);
    }
    inverse[(long long)b * wide * wide + pixel] = sum <= 0 ? 0 : 1 / sqrtf(sum);  // opposite neighbours can cancel out
}

// Unit embeddings [B, D, 2s, 2s] in z's type, a group of channels a thread.
template <typename T>
__device__ inline void embeddings(const T *z, const float *inverse, int D, int s, int group, T *result) {
    int wide = 2 * s, pixel = EACH(x), b = EACH(z), area = wide * wide;
    if (pixel >= area) return;
    Tap down = tap(pixel / wide, s, wide), across = tap(pixel % wide, s, wide);
    float scale = inverse[b * area + pixel];
    int first = EACH(y) * group, last = min(first + group, D);
    for (int channel = first; channel < last; ++channel) {
        const T *plane = z + ((long long)b * D + channel) * s * s;
        float a = value(plane[down.first * s + across.first]), c = value(plane[down.first * s + across.second]);
        float e = value(plane[down.second * s + across.first]), f = value(plane[down.second * s + across.second]);
        float left = a + (e - a) * down.weight, right = c + (f - c) * down.weight;
        put(result + ((long long)b * D + channel) * area + pixel, (left + (right - left) * across.weight) * scale);
    }
}

// A cosine at the full grid is a sum of 3 x 3 dot products at z's: resized to the wide grid, divided by the lengths
// there, resized again. The weights are the same for every text. They count from row `top` and column `left` of z.
__device__ inline void weigh(const float *inverse, int s, int y, int x, int top, int left, float weights[9]) {
    int wide = 2 * s;
    Tap down = tap(y, wide, 2 * wide), across = tap(x, wide, 2 * wide);
#pragma unroll
    for (int k = 0; k < 9; ++k) weights[k] = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        int row = corner / 2 ? down.second : down.first, column = corner % 2 ? across.second : across.first;
        float share = (corner / 2 ? down.weight : 1 - down.weight) * (corner % 2 ? across.weight : 1 - across.weight);
        share *= inverse[row * wide + column];
        Tap v = tap(row, s, wide), u = tap(column, s, wide);
#pragma unroll
        for (int k = 0; k < 9; ++k) {
            int i = top + k / 3, j = left + k % 3;
            float vertical = (i == v.first ? 1 - v.weight : 0) + (i == v.second ? v.weight : 0);
            float horizontal = (j == u.first ? 1 - u.weight : 0) + (j == u.second ? u.weight : 0);
            weights[k] += share * vertical * horizontal;
        }
    }
}

// Where the 3 x 3 begin, for a pixel of the full grid.
__device__ inline int origin(int at, int s) { return tap(tap(at, 2 * s, 4 * s).first, s, 2 * s).first; }

// Where in a plane of z the 3 x 3 lie; beyond its edges, where weights are 0, they are the edge's.
__device__ inline void surround(int top, int left, int s, int place[9]) {
#pragma unroll
    for (int k = 0; k < 9; ++k) place[k] = min(top + k / 3, s - 1) * s + min(left + k % 3, s - 1);
}

// Unit embeddings of K pixels of the full grid, from one image's z: float16 [K, D]. places: int32 [K, 2], each one's row
// and column. The channels are gone through twice: for the length, then for what is written.
template <typename T>
__device__ inline void pick(const T *z, const float *inverse, int D, int s, const int *places, int K, Half *result) {
    int k = EACH(x), place[9];
    if (k >= K) return;
    int y = places[2 * k], x = places[2 * k + 1], top = origin(y, s), left = origin(x, s);
    float weights[9], length = 0;
    weigh(inverse, s, y, x, top, left, weights);
    surround(top, left, s, place);
    for (int pass = 0; pass < 2; ++pass) {
        float scale = length <= 0 ? 0 : 1 / sqrtf(length);
        const T *plane = z;
#pragma unroll 2
        for (int channel = 0; channel < D; ++channel, plane += s * s) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 9; ++i) sum += weights[i] * value(plane[place[i]]);
            if (pass) put(result + (long long)k * D + channel, sum * scale);
            else length += sum * sum;
        }
    }
}

// Each pixel's best text: dots [B, N, s, s] to labels [B, 4s, 4s] and their cosines, two rows a thread. Texts are
// numbered from `offset`; beyond 0 what is in `labels` and `best` stays where no cosine is larger.
template <typename T, typename L>
__device__ inline void label(const T *dots, const float *inverse, int N, int s, int offset, L *labels, float *best) {
    int full = 4 * s, x = EACH(x), y = 2 * EACH(y), b = EACH(z);
    if (x >= full) return;
    int top = origin(y, s), left = origin(x, s);  // the next row's nine lie there too
    float upper[9], lower[9];
    weigh(inverse + (long long)b * 4 * s * s, s, y, x, top, left, upper);
    weigh(inverse + (long long)b * 4 * s * s, s, y + 1, x, top, left, lower);
    int place[9];
    surround(top, left, s, place);
    long long first = ((long long)b * full + y) * full + x, second = first + full;
    float high = offset ? best[first] : -2, low = offset ? best[second] : -2;  // -2 is below every cosine
    int above = -1, below = -1;
    const T *plane = dots + (long long)b * N * s * s;
#pragma unroll 2
    for (int n = 0; n < N; ++n, plane += s * s) {
        float a = 0, c = 0;
#pragma unroll
        for (int k = 0; k < 9; ++k) {
            float dot = value(plane[place[k]]);
            a += upper[k] * dot;
            c += lower[k] * dot;
        }
        if (a > high) high = a, above = n;
        if (c > low) low = c, below = n;
    }
    if (above >= 0 || !offset) labels[first] = (L)(max(above, 0) + offset);
    if (below >= 0 || !offset) labels[second] = (L)(max(below, 0) + offset);
    best[first] = high;
    best[second] = low;
}

// Adds the cosines of `count` windows to a scaled photo's map [N, h, w], each over the number of windows that cover
// a pixel: rows [h] and columns [w] hold one over the number along each axis. places: as in cut_windows.
template <typename T>
__device__ inline void add_scores(const T *dots, const float *inverse, int N, int s, const int *places, int count,
                                  const float *rows, const float *columns, int h, int w, float *map) {
    int x = EACH(x), y = EACH(y), size = 4 * s;
    if (x >= w) return;
    for (int b = 0; b < count; ++b) {
        const int *window = places + 4 * b;
        int row = y - window[1], column = x - window[2];
        if (row < 0 || row >= size || column < 0 || column >= size) continue;
        if (window[3]) column = size - 1 - column;
        int top = origin(row, s), left = origin(column, s), place[9];
        float weights[9], share = rows[y] * columns[x];
        weigh(inverse + (long long)b * 4 * s * s, s, row, column, top, left, weights);
        surround(top, left, s, place);
        const T *plane = dots + (long long)b * N * s * s;
        for (int n = 0; n < N; ++n, plane += s * s) {
            float score = 0;
#pragma unroll
            for (int k = 0; k < 9; ++k) score += weights[k] * value(plane[place[k]]);
            map[((long long)n * h + y) * w + x] += score * share;
        }
    }
}

// The best text of a photo's pixels [H, W] over the sum of its scales' maps, a strip of rows from `start` at a time.
// maps: int64 [scales, 3], each map's address, height and width; at most 8. `offset` as in label.
extern "C" __global__ void combine(const long long *maps, int scales, int N, int H, int W, int start, int offset,
                                   int *labels, float *best) {
    int x = EACH(x), y = start + EACH(y);
    if (x >= W || y >= H) return;
    const float *corner[8];
    int right[8], below[8], plane[8];
    float down[8], across[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i >= scales) continue;
        int h = (int)maps[3 * i + 1], w = (int)maps[3 * i + 2];
        Tap v = tap(y, h, H), u = tap(x, w, W);
        corner[i] = (const float *)maps[3 * i] + v.first * w + u.first;
        right[i] = u.second - u.first;
        below[i] = (v.second - v.first) * w;
        plane[i] = h * w;
        down[i] = v.weight;
        across[i] = u.weight;
    }
    long long at = (long long)y * W + x;
    float highest = offset ? best[at] : -1e30f;
    int found = -1;
    for (int n = 0; n < N; ++n) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i >= scales) continue;
            const float *here = corner[i] + (long long)n * plane[i];
            float a = here[0], c = here[right[i]], e = here[below[i]], f = here[below[i] + right[i]];
            float left = a + (e - a) * down[i], other = c + (f - c) * down[i];
            sum += left + (other - left) * across[i];
        }
        if (sum > highest) highest = sum, found = n;
    }
    if (found >= 0 || !offset) labels[at] = max(found, 0) + offset;
    best[at] = highest;
}

#define FOR_TYPE(T, suffix)                                                                                            \
    extern "C" __global__ void products_##suffix(const T *z, int D, int s, int group, float *sums) {                   \
        products(z, D, s, group, sums);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void embeddings_##suffix(const T *z, const float *inverse, int D, int s, int group,          \
                                                   T *result) {                                                        \
        embeddings(z, inverse, D, s, group, result);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void pick_##suffix(const T *z, const float *inverse, int D, int s, const int *places,        \
                                             int K, Half *result) {                                                    \
        pick(z, inverse, D, s, places, K, result);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void label_##suffix(const T *dots, const float *inverse, int N, int s, int offset,           \
                                              unsigned char *labels, float *best) {                                    \
        label(dots, inverse, N, s, offset, labels, best);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void label_many_##suffix(const T *dots, const float *inverse, int N, int s, int offset,      \
                                                   int *labels, float *best) {                                         \
        label(dots, inverse, N, s, offset, labels, best);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void add_scores_##suffix(const T *dots, const float *inverse, int N, int s,                  \
                                                   const int *places, int count, const float *rows,                    \
                                                   const float *columns, int h, int w, float *map) {                   \
        add_scores(dots, inverse, N, s, places, count, rows, columns, h, w, map);                                      \
    }
FOR_TYPE(float, fp32)
FOR_TYPE(Half, fp16)
FOR_TYPE(Bfloat, bf16)
