// A 3x3 convolution to 160 channels or a multiple as a matrix product on Hopper's tensor cores (wgmma), NHWC.
//
// A block computes TILE_ROWS x 64 positions of a map and 160 channels. What these positions see, with a margin of one, lies in
// shared memory once and serves all nine taps: there a pixel's 8 channels are 16 bytes and pixels follow one another, so that
// a tap is another start address. Three warps fetch maps (cp.async), one thread weights (bulk copies), into rings; two
// warpgroups multiply. Blocks stay and take tile after tile. With scale and shift of a norm, whoever fetched a value turns it
// into its SiLU; a skip path goes through the ring as further chunks of the tile.
//
// Defined by conv3x3_cuda.py, which reserves the shared memory:
//   HALF                    1: fp16, 0: bf16
//   TILE_ROWS, TILE_WIDTH   positions of a tile: 2 or 4 rows of 64, M of one wgmma
//   COLUMNS, DEPTH          output channels of a block, 160, and input channels of a chunk, 32
//   NUM_SLABS, NUM_WEIGHTS  places of the rings: of a chunk of maps, and of its weights for a tap
//   PLANE                   bytes of 8 channels of a slab

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define ROWS_EACH (TILE_ROWS / 2)  // of a warpgroup
#define PARTS (2 * ROWS_EACH)
#define SLAB_WIDTH (TILE_WIDTH + 2)
#define SLAB_PIXELS ((TILE_ROWS + 2) * SLAB_WIDTH)
#define SLAB_BYTES (DEPTH / 8 * PLANE)
#define WEIGHT_BYTES (DEPTH * COLUMNS * 2)
#define LOADERS 96  // threads that fetch maps
#define AHEAD 2     // chunks that they have under way
#define AT_ONCE 4   // pixels that one of them normalizes at once
#define SUMS_BYTES (8 * 2 * COLUMNS * 4)

static_assert(TILE_WIDTH == 64 && COLUMNS == 160 && DEPTH == 32, "what the instructions below are written for");
static_assert(PLANE >= SLAB_PIXELS * 16 && PLANE % 128 == 32, "four planes lie in other banks");

__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void wait_for(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}

// K-major, not swizzled: 8 rows of 16 bytes are 128 contiguous ones; along_k: bytes from 8 of k to the next 8
__device__ __forceinline__ u64 descriptor(u32 address, u32 along_k) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(along_k >> 4) << 16 | (u64)(128 >> 4) << 32;
}

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(d, i) D4(d, i), D4(d, i + 4)
#if HALF
#define TYPES "f32.f16.f16"
#else
#define TYPES "f32.bf16.bf16"
#endif

__device__ __forceinline__ void multiply(float (&d)[80], u64 a, u64 b, int keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %82, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n160k16." TYPES " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
      "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
      "%80, %81, p, 1, 1, 0, 0;\n}"
      : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32), D8(d, 40), D8(d, 48), D8(d, 56), D8(d, 64), D8(d, 72)
      : "l"(a), "l"(b), "r"(keep));
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}
__device__ __forceinline__ float unpack(u32 packed, int high) {
#if HALF
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)(high ? packed >> 16 : packed & 0xFFFF)));
  return value;
#else
  return __uint_as_float(high ? packed & 0xFFFF0000u : packed << 16);
#endif
}
__device__ __forceinline__ float silu(float x) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1 + e));
  return x * r;
}
template <typename T>
__device__ __forceinline__ T xor_lane(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFF, value, mask);
}
// Of two neighbouring lanes that have two values each: the even one gets the first of both, the odd one the second.
__device__ __forceinline__ void transpose(u32 (&values)[2], int lane) {
  const bool odd = lane & 1;
  const u32 got = xor_lane(odd ? values[0] : values[1], 1);
  (odd ? values[0] : values[1]) = got;
}

struct Arguments {
  const u16 *maps, *weights;
  const float *scale, *shift;
  const u16* skip;
  u16* out;
  float* sums;
  int height, width, in, out_channels, num_tiles;
  int chunks, column_blocks;
};

struct Tile {
  int column_block, sample, y, x;
};
__device__ __forceinline__ Tile tile_at(int number, const Arguments& of) {
  Tile tile;
  tile.column_block = number % of.column_blocks;
  number /= of.column_blocks;
  const int across = of.width / TILE_WIDTH, down = of.height / TILE_ROWS;
  tile.x = number % across * TILE_WIDTH;
  number /= across;
  tile.y = number % down * TILE_ROWS;
  tile.sample = number / down;
  return tile;
}

// Begin to fetch a chunk of a tile's pixels and of MARGIN around them, 8 channels a thread; outside the map are zeros.
template <int MARGIN>
__device__ __forceinline__ void fetch(u32 slab, int loader, const u16* source, Tile tile, int height, int width, int channels) {
  constexpr int ACROSS = TILE_WIDTH + 2 * MARGIN, PIXELS = (TILE_ROWS + 2 * MARGIN) * ACROSS;
  source += loader % 4 * 8;
  slab += loader % 4 * PLANE;
  for (int pixel = loader / 4; pixel < PIXELS; pixel += LOADERS / 4) {
    const int y = tile.y + pixel / ACROSS - MARGIN, x = tile.x + pixel % ACROSS - MARGIN;
    const bool inside = (u32)y < (u32)height && (u32)x < (u32)width;
    const u16* from = inside ? source + (y * width + x) * channels : source;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(slab + pixel * 16), "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  }
}

// Turn what this thread fetched into SiLU(value * scale + shift); the zeros around the map stay.
__device__ __forceinline__ void normalize(u32 slab, int loader, Tile tile, int height, int width, const float (&scale)[8],
                                          const float (&shift)[8]) {
  slab += loader % 4 * PLANE;
#pragma unroll 1
  for (int start = loader / 4; start < SLAB_PIXELS; start += AT_ONCE * (LOADERS / 4)) {
    u32 values[AT_ONCE][4];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {  // after the slab's end other things are read, and not used
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(values[j][0]), "=r"(values[j][1]), "=r"(values[j][2]), "=r"(values[j][3])
                   : "r"(slab + (start + j * (LOADERS / 4)) * 16) : "memory");
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = unpack(values[j][i], 0) * scale[2 * i] + shift[2 * i];
        const float high = unpack(values[j][i], 1) * scale[2 * i + 1] + shift[2 * i + 1];
        values[j][i] = pack(silu(low), silu(high));
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int pixel = start + j * (LOADERS / 4);
      const int y = tile.y + pixel / SLAB_WIDTH - 1, x = tile.x + pixel % SLAB_WIDTH - 1;
      if (pixel < SLAB_PIXELS && (u32)y < (u32)height && (u32)x < (u32)width) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(slab + pixel * 16), "r"(values[j][0]),
                     "r"(values[j][1]), "r"(values[j][2]), "r"(values[j][3]) : "memory");
      }
    }
  }
}

struct Ring {  // a place in a ring, and how often it was gone around
  int place;
  u32 parity;
  __device__ __forceinline__ void next(int size) {
    if (++place == size) place = 0, parity ^= 1;
  }
};

struct Place {  // a chunk of a tile, of those that a block takes
  int number, chunk;
  __device__ __forceinline__ void advance(int chunks) {
    if (++chunk == chunks) chunk = 0, number += gridDim.x;
  }
};

struct Shared {
  u32 slabs, taps;  // the rings
  float* partial;   // sums of each warp
  u32 slab_full, slab_free, tap_full, tap_free;  // barriers: of each place of the rings
  float* biases;    // of all output channels
};
__device__ __forceinline__ Shared shared_parts(unsigned char* start) {
  Shared parts;
  float* partial = (float*)(start + NUM_SLABS * SLAB_BYTES + NUM_WEIGHTS * WEIGHT_BYTES);
  parts.slabs = smem_address(start), parts.taps = parts.slabs + NUM_SLABS * SLAB_BYTES;
  parts.partial = partial;
  parts.slab_full = smem_address(partial) + SUMS_BYTES, parts.slab_free = parts.slab_full + 8 * NUM_SLABS;
  parts.tap_full = parts.slab_free + 8 * NUM_SLABS, parts.tap_free = parts.tap_full + 8 * NUM_WEIGHTS;
  parts.biases = partial + SUMS_BYTES / 4 + 4 * (NUM_SLABS + NUM_WEIGHTS);
  return parts;
}

// Fill the ring of slabs: the chunks of each tile, then, with a skip path, those of what is added to it.
__device__ __forceinline__ void load_maps(const Arguments& of, const Shared& to, int loader) {
  const int chunks = of.chunks + (of.skip ? COLUMNS / DEPTH : 0);
  const int steps = (of.num_tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * chunks;
  Place next = {(int)blockIdx.x, 0}, last = next;  // what is fetched next, and what has arrived last
  Tile tile, last_tile;
  Ring ring = {0, 1}, last_ring = ring;  // the first time around, all is free
  for (int step = 0; step < steps + AHEAD; ++step) {
    const bool is_normed = step >= AHEAD && of.scale && last.chunk < of.chunks;
    float factor[8], summand[8];
    if (step >= AHEAD && last.chunk == 0) last_tile = tile_at(last.number, of);
    if (is_normed) {
      const long long channel = (long long)last_tile.sample * of.in + last.chunk * DEPTH + loader % 4 * 8;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *(float4*)(factor + i) = *(const float4*)(of.scale + channel + i);
        *(float4*)(summand + i) = *(const float4*)(of.shift + channel + i);
      }
    }
    if (step < steps) {
      if (next.chunk == 0) tile = tile_at(next.number, of);
      const long long map = (long long)tile.sample * of.height * of.width;
      const u32 slab = to.slabs + ring.place * SLAB_BYTES;
      wait_for(to.slab_free + 8 * ring.place, ring.parity);
      if (next.chunk < of.chunks) {
        fetch<1>(slab, loader, of.maps + map * of.in + next.chunk * DEPTH, tile, of.height, of.width, of.in);
      } else {
        const int column = tile.column_block * COLUMNS + (next.chunk - of.chunks) * DEPTH;
        fetch<0>(slab, loader, of.skip + map * of.out_channels + column, tile, of.height, of.width, of.out_channels);
      }
      ring.next(NUM_SLABS);
      next.advance(chunks);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (step < AHEAD) continue;
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory");
    if (is_normed) normalize(to.slabs + last_ring.place * SLAB_BYTES, loader, last_tile, of.height, of.width, factor, summand);
    arrive(to.slab_full + 8 * last_ring.place);
    last_ring.next(NUM_SLABS);
    last.advance(chunks);
  }
}

// Fill the ring of weights: nine taps for each chunk of each tile. For one thread.
__device__ __forceinline__ void load_weights(const Arguments& of, const Shared& to) {
  Ring ring = {0, 1};
  for (int number = blockIdx.x; number < of.num_tiles; number += gridDim.x) {
    const u16* source = of.weights + (long long)tile_at(number, of).column_block * of.chunks * 9 * DEPTH * COLUMNS;
    for (int step = 0; step < of.chunks * 9; ++step, source += DEPTH * COLUMNS) {
      wait_for(to.tap_free + 8 * ring.place, ring.parity);
      const u32 full = to.tap_full + 8 * ring.place;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(WEIGHT_BYTES) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       to.taps + ring.place * WEIGHT_BYTES), "l"(source), "r"(WEIGHT_BYTES), "r"(full) : "memory");
      ring.next(NUM_WEIGHTS);
    }
  }
}

// Convolve a warpgroup's rows of a tile.
__device__ __forceinline__ void convolve(float (&values)[ROWS_EACH][80], Ring& slab, Ring& tap, const Arguments& of,
                                         const Shared& from, int group, int lane) {
  u32 slab_before = 0, tap_before = 0;  // whose reading may still be under way
  for (int chunk = 0; chunk < of.chunks; ++chunk) {
    wait_for(from.slab_full + 8 * slab.place, slab.parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // threads wrote it, wgmma reads it
    const u32 seen = from.slabs + slab.place * SLAB_BYTES + group * ROWS_EACH * SLAB_WIDTH * 16;
#pragma unroll
    for (int step = 0; step < 9; ++step) {
      wait_for(from.tap_full + 8 * tap.place, tap.parity);
      const u32 weight = from.taps + tap.place * WEIGHT_BYTES;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < DEPTH / 16; ++k) {
        const u64 b = descriptor(weight + k * 2 * COLUMNS * 16, COLUMNS * 16);
#pragma unroll
        for (int row = 0; row < ROWS_EACH; ++row) {
          const int shift = (row + step / 3) * SLAB_WIDTH + step % 3;
          multiply(values[row], descriptor(seen + k * 2 * PLANE + shift * 16, PLANE), b, (chunk | step | k) != 0);
        }
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (lane == 0) {
        if (tap_before) arrive(tap_before);
        if (step == 0 && slab_before) arrive(slab_before);
      }
      tap_before = from.tap_free + 8 * tap.place;
      tap.next(NUM_WEIGHTS);
    }
    slab_before = from.slab_free + 8 * slab.place;
    slab.next(NUM_SLABS);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int row = 0; row < ROWS_EACH; ++row) {
#pragma unroll
    for (int i = 0; i < 80; ++i) asm volatile("" : "+f"(values[row][i])::"memory");  // read after the wait
  }
  if (lane == 0) arrive(tap_before), arrive(slab_before);
}

// Add bias and skip path, round, store, and sum what was stored and its squares.
__device__ __forceinline__ void store(const float (&values)[ROWS_EACH][80], Ring& slab, const Arguments& of,
                                      const Shared& from, int number, int group, int warp, int lane) {
  const Tile tile = tile_at(number, of);
  const int first = tile.column_block * COLUMNS;
  // a lane has, of every 8 columns, 2, in rows lane / 4 and 8 further of each 16 rows of its warp; it writes 4 of one in two
  const long long row = (long long)tile.sample * of.height + tile.y + group * ROWS_EACH;
  const long long position = row * of.width + tile.x + warp * 16 + lane / 4;
  u16* to = of.out + position * of.out_channels + first + lane % 2 * 8 + lane % 4 / 2 * 4;
  float* own = from.partial + (group * 4 + warp) * 2 * COLUMNS;
#pragma unroll
  for (int batch = 0; batch < COLUMNS / 16; ++batch, to += 16) {
    u32 now[PARTS][2];  // the skip path, of which a chunk serves two batches
    if (of.skip && batch % 2 == 0) wait_for(from.slab_full + 8 * slab.place, slab.parity);
    const u32 chunk = from.slabs + slab.place * SLAB_BYTES + batch % 2 * 2 * PLANE +
                      (group * ROWS_EACH * TILE_WIDTH + warp * 16 + lane / 4) * 16 + lane % 4 * 4;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      now[part][0] = now[part][1] = 0;
      if (of.skip) {
        const u32 at = chunk + (part / 2 * TILE_WIDTH + part % 2 * 8) * 16;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(now[part][0]) : "r"(at) : "memory");
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(now[part][1]) : "r"(at + PLANE) : "memory");
      }
    }
    if (of.skip && batch % 2 == 1) {
      __syncwarp();
      if (lane == 0) arrive(from.slab_free + 8 * slab.place);
      slab.next(NUM_SLABS);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = batch * 2 + i, column = n * 8 + lane % 4 * 2;
      const float2 bias = *(const float2*)(from.biases + first + column);
      float sum[2] = {0, 0}, square[2] = {0, 0};
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const float* value = &values[part / 2][n * 4 + part % 2 * 2];
        const u32 rounded = pack(value[0] + bias.x + unpack(now[part][i], 0), value[1] + bias.y + unpack(now[part][i], 1));
        now[part][i] = rounded;
        const float low = unpack(rounded, 0), high = unpack(rounded, 1);
        sum[0] += low, sum[1] += high, square[0] += low * low, square[1] += high * high;
      }
      // over the 8 lanes that have these columns, so that each ends with one of the four numbers
      const bool upper = lane & 16, odd = lane & 8;
      float a = upper ? square[0] : sum[0], b = upper ? square[1] : sum[1];
      a += xor_lane(upper ? sum[0] : square[0], 16), b += xor_lane(upper ? sum[1] : square[1], 16);
      float total = (odd ? b : a) + xor_lane(odd ? a : b, 8);
      total += xor_lane(total, 4);
      if ((lane & 4) == 0) own[(upper ? COLUMNS : 0) + column + (odd ? 1 : 0)] = total;
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      transpose(now[part], lane);
      const long long further = part / 2 * of.width + part % 2 * 8;
      *(uint2*)(to + further * of.out_channels) = make_uint2(now[part][0], now[part][1]);
    }
  }
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  const int tiles_of_sample = of.height / TILE_ROWS * (of.width / TILE_WIDTH);
  const int in_sample = number / of.column_blocks % tiles_of_sample;
  const long long half = ((long long)tile.sample * tiles_of_sample + in_sample) * 2 + group;
  float* target = of.sums + half * 2 * of.out_channels + first;
  for (int i = warp * 32 + lane; i < 2 * COLUMNS; i += 128) {
    const float* of_group = from.partial + group * 4 * 2 * COLUMNS + i;
    const float total = of_group[0] + of_group[2 * COLUMNS] + of_group[4 * COLUMNS] + of_group[6 * COLUMNS];
    target[i / COLUMNS * of.out_channels + i % COLUMNS] = total;
  }
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");  // before the next tile's sums
}

extern "C" __global__ void __launch_bounds__(384, 1)
varcli_conv3x3(const u16* __restrict__ maps,     // (B, H, W, in)
               const u16* __restrict__ weights,  // (O / 160, in / 32, 9 taps, 4, 160, 8)
               const float* __restrict__ scale,  // (B, in), or null
               const float* __restrict__ shift,
               const float* __restrict__ bias,   // (O), or null
               const u16* __restrict__ skip,     // (B, H, W, O), or null
               u16* __restrict__ out,            // (B, H, W, O)
               float* __restrict__ sums,         // (B, H * W / (32 * TILE_ROWS), 2, O)
               int height, int width, int in, int out_channels, int num_tiles) {
  extern __shared__ __align__(128) unsigned char memory[];
  const Shared shared = shared_parts(memory);
  const Arguments given = {maps, weights, scale, shift, skip, out, sums, height, width, in, out_channels, num_tiles,
                           in / DEPTH, out_channels / COLUMNS};
  const int thread = threadIdx.x;
  for (int i = thread; i < out_channels; i += blockDim.x) shared.biases[i] = bias ? bias[i] : 0;
  if (thread == 0) {
    for (int i = 0; i < 8 * NUM_SLABS; i += 8) {
      init_barrier(shared.slab_full + i, LOADERS), init_barrier(shared.slab_free + i, 8);
    }
    for (int i = 0; i < 8 * NUM_WEIGHTS; i += 8) {
      init_barrier(shared.tap_full + i, 1), init_barrier(shared.tap_free + i, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (thread < 128) {
    // 88 + 2 * 208 registers are three times the 168 that all begin with
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    if (thread >= 128 - LOADERS) load_maps(given, shared, thread - (128 - LOADERS));
    if (thread == 0) load_weights(given, shared);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
  const int group = thread / 128 - 1, warp = thread / 32 % 4, lane = thread % 32;
  float values[ROWS_EACH][80];
  Ring slab = {0, 0}, tap = {0, 0};
  for (int number = blockIdx.x; number < num_tiles; number += gridDim.x) {
    convolve(values, slab, tap, given, shared, group, lane);
    store(values, slab, given, shared, number, group, warp, lane);
  }
}
