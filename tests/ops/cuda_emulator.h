// Runs a CUDA source of csrc/cuda on the host: what <cuda_runtime.h> and the file's device primitives are under nvcc,
// this header is under g++ (C++17). For tests: it is strict where a GPU is silent, and slow.
//
// Every thread of a block is a fiber (its own stack, switched by hand); the blocks of a cluster run together, a block
// without a cluster, and clusters, run one after the other. A function
// that the hardware runs for a whole warp (matrix products, ldmatrix, shuffles) blocks its fiber until all 32 have
// called it; then the last one computes the results of all from the PTX ISA's fragment layouts, given below.
//
// A launch fails, with the first reason as its error text, when
// - threads read or write a word of shared memory that another thread wrote or read with no barrier in between (a
//   happens-before check, word by word: independent of the order the fibers run in), or that a copy under way targets;
// - a block reads a word of another one's shared memory with no barrier of the cluster between that and the write, or
//   while the block may have ended or the cluster may not exist;
// - shared memory is read that nothing has written, or an access is misaligned or out of bounds;
// - an element of global memory is written twice, or read although it is outside of what the test has said;
// - the lanes of a warp disagree on what they call, or not all of them come (a deadlock on a GPU);
// - more shared memory is asked for than cudaFuncSetAttribute has allowed, or than compute capability 8.6 has.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline float __uint_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline int __popcll(uint64_t word) { return __builtin_popcountll(word); }

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMaxCluster = 8;
constexpr size_t kDefaultSharedBytes = 48 << 10;

// ---- Failures ----

inline char failure[256];

inline void fail(const char* format, ...) {
  if (failure[0] != 0) return;  // the first is the cause
  char text[160];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  std::snprintf(failure, sizeof failure, "%s (block %u, thread %u)", text, blockIdx.x, threadIdx.x);
}

// ---- Fibers ----

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes;
  bool zero;
};

struct Thread {
  unsigned index;
  bool started = false, done = false;
  // Blocked while the counter still has this value.
  const uint64_t* counter = nullptr;
  uint64_t value = 0;
  // Barriers passed.
  uint64_t block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;
  uint64_t cluster_arrivals = 0;
  bool relaxed = false;                   // the latest arrival made nothing seen
  bool reads_remotely = false;            // since the latest barrier of the block
  std::vector<std::vector<Copy>> groups = {{}};  // copies under way; the last group is still open
  ucontext_t start;
  jmp_buf resume;
};

// Where threads meet: `generation` counts the meetings.
struct Meeting {
  unsigned arrived = 0;
  uint64_t generation = 0;
  const char* what = nullptr;
  void* arguments[kWarp];
};

// The latest write of a word of shared memory, and the reads since the block's latest barrier.
struct Word {
  static constexpr int kNone = -1, kMany = -2;
  int writer = kNone;
  uint64_t write_block_epoch = 0, write_warp_epoch = 0;
  int reader = kNone, reading_warp = kNone;
  uint64_t read_block_epoch = 0, read_warp_epoch = 0;
  int copying = kNone;  // the thread a copy to this word is under way for
  // Barriers of the cluster that the writer and the latest reader in another block had arrived at.
  uint64_t write_arrivals = 0, remote_read_arrivals = 0;
  bool remotely_read = false;
};

struct Block {
  unsigned index, ended = 0;  // in the grid; threads that have ended
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<uint32_t> shared;
  std::vector<Word> words;
};

struct Cluster {
  std::vector<Block> blocks;
  Meeting all;
  const std::function<void()>* body;
  jmp_buf scheduler;
};

inline Cluster* cluster;
inline Block* block;
inline Thread* self;
inline std::vector<std::pair<uintptr_t, uintptr_t>> readable;  // from, to; all if empty
// By this launch: words of global memory, and a bit for each of their halves.
inline std::unordered_map<uintptr_t, unsigned> written;

inline void yield() {
  if (_setjmp(self->resume) == 0) _longjmp(cluster->scheduler, 1);
}

inline void wait_while(const uint64_t& counter, uint64_t value) {
  self->counter = &counter;
  self->value = value;
  yield();
}

inline void fiber_main() {
  (*cluster->body)();
  for (const auto& group : self->groups) {
    if (!group.empty()) fail("a thread ended with copies under way");
  }
  if (self->cluster_epoch != self->cluster_arrivals) fail("a thread ended between cluster_arrive and cluster_wait");
  self->done = true;
  ++block->ended;
  _longjmp(cluster->scheduler, 1);
}

// In a function of its own, as getcontext returns twice and spares no local variable.
inline void __attribute__((noinline)) prepare(Thread& thread, char* stack) {
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stack;
  thread.start.uc_stack.ss_size = kStackBytes;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, fiber_main, 0);
}

// Runs a fiber until it blocks or ends. In a function of its own, as a jump back spares no local variable.
inline void __attribute__((noinline)) run(Block& of, Thread& thread) {
  thread.counter = nullptr;
  block = &of;
  self = &thread;
  blockIdx.x = of.index;
  threadIdx.x = thread.index;
  if (_setjmp(cluster->scheduler) != 0) return;
  if (self->started) _longjmp(self->resume, 1);
  self->started = true;
  setcontext(&self->start);
}

// Runs all fibers in turn until all are done.
inline void run_cluster() {
  for (;;) {
    bool progress = false, waiting = false;
    for (Block& of : cluster->blocks) {
      for (Thread& thread : of.threads) {
        if (thread.done) continue;
        waiting = true;
        if (thread.counter != nullptr && *thread.counter == thread.value) continue;
        progress = true;
        run(of, thread);
      }
    }
    if (!waiting) return;
    if (!progress) {
      // Their stacks are dropped with the cluster.
      fail("deadlock: some threads wait for others that have ended or wait elsewhere");
      return;
    }
  }
}

// Blocks until all lanes of the warp have come with the same `what`; the last one calls compute(arguments of all).
template <typename Compute>
void meet_warp(const char* what, void* arguments, Compute compute) {
  Meeting& meeting = block->warps[self->index / kWarp];
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0) fail("lanes of a warp call %s and %s together", meeting.what, what);
  meeting.arguments[self->index % kWarp] = arguments;
  if (++meeting.arrived < kWarp) {
    wait_while(meeting.generation, meeting.generation);
    return;
  }
  meeting.arrived = 0;
  if (failure[0] == 0) compute(meeting.arguments);
  ++meeting.generation;
}

// ---- Shared memory ----

inline bool comes_after(int thread, uint64_t block_epoch, uint64_t warp_epoch) {
  if (thread == static_cast<int>(self->index) || block_epoch < self->block_epoch) return true;
  return thread / kWarp == self->index / kWarp && warp_epoch < self->warp_epoch;
}

inline Word* word_at(uint32_t address, uint32_t bytes, const char* what) {
  if (address % bytes != 0) fail("%s at %u is not aligned to %u bytes", what, address, bytes);
  if (address + bytes > block->shared.size() * 4) {
    fail("%s at %u is outside the %zu bytes of shared memory", what, address, block->shared.size() * 4);
    return nullptr;
  }
  return &block->words[address / 4];
}

inline void check_write(uint32_t address, uint32_t bytes, const char* what) {
  Word* word = word_at(address, bytes, what);
  for (uint32_t i = 0; word != nullptr && i < bytes / 4; ++i, ++word) {
    if (word->copying != Word::kNone) fail("%s at %u meets a copy under way", what, address);
    if (word->writer != Word::kNone && !comes_after(word->writer, word->write_block_epoch, word->write_warp_epoch)) {
      fail("%s at %u races with a write by thread %d", what, address, word->writer);
    }
    if (word->remotely_read && word->remote_read_arrivals >= self->cluster_epoch) {
      fail("%s at %u races with a read by another block", what, address);
    }
    if (word->reader == Word::kNone || word->read_block_epoch < self->block_epoch) continue;
    const bool ordered = word->reader == static_cast<int>(self->index) ||
                         (word->reading_warp == static_cast<int>(self->index / kWarp) &&
                          word->read_warp_epoch < self->warp_epoch);
    if (!ordered) fail("%s at %u races with a read by thread %d", what, address, word->reader);
  }
}

inline void record_write(uint32_t address, const uint32_t* values, uint32_t count) {
  for (uint32_t i = 0; i < count && address / 4 + i < block->words.size(); ++i) {
    block->shared[address / 4 + i] = values[i];
    Word& word = block->words[address / 4 + i];
    word.writer = self->index;
    word.write_block_epoch = self->block_epoch;
    word.write_warp_epoch = self->warp_epoch;
    word.write_arrivals = self->cluster_arrivals;
    word.remotely_read = false;
    word.reader = Word::kNone;
    word.copying = Word::kNone;
  }
}

// Reads by `thread`, which need not be the running one: the last lane of a warp reads for all.
inline void read(Thread& thread, uint32_t address, uint32_t* values, uint32_t bytes, const char* what) {
  Thread* const running = self;
  self = &thread;
  Word* word = word_at(address, bytes, what);
  for (uint32_t i = 0; word != nullptr && i < bytes / 4; ++i, ++word) {
    values[i] = block->shared[address / 4 + i];
    const int index = thread.index, warp = thread.index / kWarp;
    if (word->copying != Word::kNone) fail("%s at %u meets a copy under way", what, address);
    if (word->writer == Word::kNone) {
      fail("%s at %u reads what nothing has written", what, address);
    } else if (!comes_after(word->writer, word->write_block_epoch, word->write_warp_epoch)) {
      fail("%s at %u races with a write by thread %d", what, address, word->writer);
    }
    const bool first = word->reader == Word::kNone || word->read_block_epoch < thread.block_epoch;
    word->reader = first || word->reader == index ? index : Word::kMany;
    word->reading_warp = first || word->reading_warp == warp ? warp : Word::kMany;
    word->read_block_epoch = thread.block_epoch;
    word->read_warp_epoch = thread.warp_epoch;
  }
  self = running;
}

// ---- Element formats ----

// One sign bit, `exponent_bits`, and a mantissa that fills 16 bits: 5 for float16, 8 for bfloat16.
inline float decode(int exponent_bits, uint16_t bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  float value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else {
    const int leading = exponent == 0 ? 0 : 1 << mantissa_bits;
    value = std::ldexp(static_cast<float>(leading + mantissa), (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
  }
  return bits >> 15 ? -value : value;
}

// Rounds to nearest, ties to even.
inline uint16_t encode(int exponent_bits, float value) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return sign | infinity;
  int exponent;
  std::frexp(value, &exponent);
  exponent = value == 0.0f || exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
  const double mantissa = std::nearbyint(std::ldexp(static_cast<double>(std::fabs(value)), mantissa_bits - exponent));
  // The leading bit of a normal number's mantissa adds the missing one to its exponent; a carry does the same.
  const int64_t bits = (static_cast<int64_t>(exponent + bias - 1) << mantissa_bits) + static_cast<int64_t>(mantissa);
  return sign | static_cast<uint16_t>(bits >= infinity ? infinity : bits);
}

template <int EXPONENT_BITS>
float element(uint32_t word, int half) {
  static const std::vector<float> values = [] {
    std::vector<float> table(1 << 16);
    for (size_t bits = 0; bits < table.size(); ++bits) {
      table[bits] = decode(EXPONENT_BITS, static_cast<uint16_t>(bits));
    }
    return table;
  }();
  return values[word >> (16 * half) & 0xffff];
}

}  // namespace emulator

// ---- Barriers and shuffles ----

inline void __syncwarp() {
  emulator::meet_warp("__syncwarp", nullptr, [](void**) {});
  ++emulator::self->warp_epoch;
}

inline void __syncthreads() {
  emulator::Meeting& all = emulator::block->all;
  if (++all.arrived < emulator::block->threads.size()) {
    emulator::wait_while(all.generation, all.generation);
  } else {
    all.arrived = 0;
    ++all.generation;
  }
  ++emulator::self->block_epoch;
  ++emulator::self->warp_epoch;
  emulator::self->reads_remotely = false;
}

namespace emulator {

inline void arrive_at_cluster() {
  Meeting& all = cluster->all;
  if (self->cluster_arrivals++ != self->cluster_epoch) {
    fail("cluster_arrive without cluster_wait before it");
  }
  if (++all.arrived < cluster->blocks.size() * block->threads.size()) return;
  all.arrived = 0;
  ++all.generation;
}

}  // namespace emulator

inline void cluster_arrive() {
  emulator::self->relaxed = false;
  emulator::arrive_at_cluster();
}

inline void cluster_arrive_relaxed() {
  if (emulator::self->reads_remotely) emulator::fail("cluster_arrive_relaxed may overtake a read of another block");
  emulator::self->relaxed = true;
  emulator::arrive_at_cluster();
}

// What threads of a block write between the two is not ordered by them: they do not count as a barrier of the block.
inline void cluster_wait() {
  emulator::Thread& self = *emulator::self;
  if (self.cluster_arrivals == self.cluster_epoch) emulator::fail("cluster_wait without cluster_arrive");
  const uint64_t generation = emulator::cluster->all.generation;
  if (generation < self.cluster_arrivals) emulator::wait_while(emulator::cluster->all.generation, generation);
  ++self.cluster_epoch;
}

inline float __shfl_xor_sync(uint32_t mask, float value, int distance) {
  if (mask != 0xffffffffu) emulator::fail("__shfl_xor_sync of less than a warp");
  struct Lane {
    float in, out;
    int distance;
  } lane = {value, 0.0f, distance};
  emulator::meet_warp("__shfl_xor_sync", &lane, [](void** lanes) {
    for (unsigned i = 0; i < emulator::kWarp; ++i) {
      Lane* to = static_cast<Lane*>(lanes[i]);
      to->out = static_cast<Lane*>(lanes[i ^ to->distance])->in;
    }
  });
  return lane.out;
}

// ---- The device primitives of csrc/cuda ----

// Addresses of shared memory are byte offsets from its beginning.
inline uint32_t shared_base() { return 0; }

inline void store_shared(uint32_t to, uint32_t value) {
  emulator::check_write(to, 4, "store_shared");
  emulator::record_write(to, &value, 1);
}

inline void store_shared_float(uint32_t to, float value) { store_shared(to, __float_as_uint(value)); }

inline float load_shared_float(uint32_t from) {
  uint32_t value = 0;
  emulator::read(*emulator::self, from, &value, 4, "load_shared_float");
  return __uint_as_float(value);
}

inline float load_cluster_float(uint32_t from, uint32_t rank) {
  using namespace emulator;
  const char* const what = "load_cluster_float";
  if (rank >= cluster->blocks.size()) {
    fail("%s from block %u of a cluster of %zu", what, rank, cluster->blocks.size());
    return 0.0f;
  }
  if (self->relaxed) fail("%s after a relaxed arrival, which makes no write seen", what);
  self->reads_remotely = true;
  Block* const running = block;
  block = &cluster->blocks[rank];
  Word* const word = word_at(from, 4, what);
  const float value = word == nullptr ? 0.0f : __uint_as_float(block->shared[from / 4]);
  if (block->ended > 0) fail("%s from a block of which threads have ended", what);
  if (word != nullptr) {
    if (word->writer == Word::kNone) {
      fail("%s at %u reads what nothing has written", what, from);
    } else if (word->write_arrivals >= self->cluster_epoch) {
      fail("%s at %u races with a write by thread %d of block %u", what, from, word->writer, rank);
    }
    word->remotely_read = true;
    word->remote_read_arrivals = self->cluster_arrivals;
  }
  block = running;
  return value;
}

inline uint4 load_shared(uint32_t from) {
  uint32_t values[4] = {};
  emulator::read(*emulator::self, from, values, 16, "load_shared");
  return {values[0], values[1], values[2], values[3]};
}

namespace emulator {

inline void check_global_read(const void* from, size_t bytes, const char* what) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (begin % bytes != 0) fail("%s reads an unaligned address", what);
  bool inside = readable.empty();
  for (const auto& range : readable) inside = inside || (range.first <= begin && begin + bytes <= range.second);
  if (!inside) fail("%s reads outside of the operands", what);
}

}  // namespace emulator

template <typename T>
T load_global(const T* from) {
  emulator::check_global_read(from, sizeof(T), "load_global");
  return emulator::failure[0] == 0 ? *from : T{};
}

template <typename T>
void store_global(T* to, T value) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(to);
  if (address % sizeof(T) != 0) {
    emulator::fail("store_global is not aligned to %zu bytes", sizeof(T));
    return;
  }
  for (uintptr_t word = address / 4; word < (address + sizeof(T) + 3) / 4; ++word) {
    const unsigned halves = sizeof(T) >= 4 ? 3u : 1u << (address / 2 % 2);
    unsigned& before = emulator::written[word];
    if (before & halves) emulator::fail("store_global writes an address again");
    before |= halves;
  }
  *to = value;
}

// cp.async: the bytes arrive when this thread waits for their group, and not before.
template <int BYTES = 16>
void copy_async(uint32_t to, const void* from, bool zero) {
  emulator::check_write(to, BYTES, "copy_async");
  if (!zero) emulator::check_global_read(from, BYTES, "copy_async");
  for (uint32_t i = 0; i < BYTES / 4 && to / 4 + i < emulator::block->words.size(); ++i) {
    emulator::block->words[to / 4 + i].copying = emulator::self->index;
  }
  emulator::self->groups.back().push_back({to, from, BYTES, zero});
}

inline void commit_copies() { emulator::self->groups.emplace_back(); }

template <int PENDING>
void wait_copies() {
  auto& groups = emulator::self->groups;
  // The open group is not waited for.
  while (groups.size() > PENDING + 1) {
    for (const emulator::Copy& copy : groups.front()) {
      uint32_t values[4] = {};
      if (!copy.zero && emulator::failure[0] == 0) std::memcpy(values, copy.from, copy.bytes);
      emulator::record_write(copy.to, values, copy.bytes / 4);
    }
    groups.erase(groups.begin());
  }
}

namespace emulator {

// ldmatrix .m8n8.x4 .b16: lanes 8 i .. 8 i + 7 give the addresses of rows 0 .. 7 of matrix i, 16 bytes each. Lane l
// receives in word i, lower half first,
//   M_i[l / 4][2 (l % 4)], M_i[l / 4][2 (l % 4) + 1],   or with .trans
//   M_i[2 (l % 4)][l / 4], M_i[2 (l % 4) + 1][l / 4].
inline void load_matrices(uint32_t (&to)[4], uint32_t row, bool transposed) {
  struct Lane {
    uint32_t row;
    uint32_t* to;
    Thread* thread;
  } lane = {row, to, self};
  const char* what = transposed ? "ldmatrix.trans" : "ldmatrix";
  meet_warp(what, &lane, [=](void** lanes) {
    uint16_t matrices[4][8][8];
    for (unsigned i = 0; i < kWarp; ++i) {
      const Lane* from = static_cast<const Lane*>(lanes[i]);
      uint32_t values[4] = {};
      read(*from->thread, from->row, values, 16, what);
      std::memcpy(matrices[i / 8][i % 8], values, 16);
    }
    for (unsigned l = 0; l < kWarp; ++l) {
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned outer = l / 4, inner = 2 * (l % 4);
        const uint32_t low = transposed ? matrices[i][inner][outer] : matrices[i][outer][inner];
        const uint32_t high = transposed ? matrices[i][inner + 1][outer] : matrices[i][outer][inner + 1];
        static_cast<const Lane*>(lanes[l])->to[i] = low | high << 16;
      }
    }
  });
}

}  // namespace emulator

inline void load_matrices(uint32_t (&to)[4], uint32_t row) { emulator::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) { emulator::load_matrices(to, row, true); }

// mma .m16n8k16 .row.col, float32 += 16-bit x 16-bit. With g = lane / 4 and t = lane % 4 a lane holds, lower half
// first,
//   a0: A[g][2t, 2t+1]     a1: A[g+8][2t, 2t+1]     a2: A[g][2t+8, 2t+9]     a3: A[g+8][2t+8, 2t+9]
//   b0: B[2t, 2t+1][g]     b1: B[2t+8, 2t+9][g]
//   c0, c1: C[g][2t, 2t+1]     c2, c3: C[g+8][2t, 2t+1]
// Products of 16-bit elements are exact in float32; hardware promises at least float32 sums, here they are float64.
template <template <int> class Format, int EXPONENT_BITS>
void multiply_add(Format<EXPONENT_BITS>, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } lane = {c, a, {b0, b1}};
  emulator::meet_warp(EXPONENT_BITS == 5 ? "mma.f16" : "mma.bf16", &lane, [](void** lanes) {
    float left[16][16], right[16][8];
    for (unsigned l = 0; l < emulator::kWarp; ++l) {
      const Lane* from = static_cast<const Lane*>(lanes[l]);
      const unsigned g = l / 4, t = l % 4;
      for (unsigned half = 0; half < 2; ++half) {
        for (unsigned i = 0; i < 4; ++i) {
          left[g + i % 2 * 8][2 * t + half + i / 2 * 8] = emulator::element<EXPONENT_BITS>(from->a[i], half);
        }
        for (unsigned i = 0; i < 2; ++i) {
          right[2 * t + half + i * 8][g] = emulator::element<EXPONENT_BITS>(from->b[i], half);
        }
      }
    }
    for (unsigned l = 0; l < emulator::kWarp; ++l) {
      const Lane* to = static_cast<const Lane*>(lanes[l]);
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
        double sum = to->c[i];
        for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
        to->c[i] = static_cast<float>(sum);
      }
    }
  });
}

template <template <int> class Format, int EXPONENT_BITS>
uint32_t pack(Format<EXPONENT_BITS>, float low, float high) {
  const uint32_t upper = emulator::encode(EXPONENT_BITS, high);
  return upper << 16 | emulator::encode(EXPONENT_BITS, low);
}

template <template <int> class Format, int EXPONENT_BITS>
float2 unpack(Format<EXPONENT_BITS>, uint32_t word) {
  return {emulator::element<EXPONENT_BITS>(word, 0), emulator::element<EXPONENT_BITS>(word, 1)};
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

// ---- The runtime ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrClusterLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

// A model of a device. Every model that a test uses is a device of its own.
struct Device {
  int multiprocessors = 108;
  size_t max_shared_bytes = 99 << 10;
  bool clusters = false;
  int ptx_version = 80;
  int for_clusters = 0;  // multiprocessors that clusters fill, without those left over in a group; -1: it cannot say

  bool operator==(const Device& other) const {
    return multiprocessors == other.multiprocessors && max_shared_bytes == other.max_shared_bytes &&
           clusters == other.clusters && ptx_version == other.ptx_version && for_clusters == other.for_clusters;
  }
};

inline std::vector<Device> devices = {Device{}};
inline size_t current = 0;
inline std::map<std::pair<const void*, size_t>, size_t> allowed_shared_bytes;  // of a kernel on a device
// Questions to the runtime, and settings of functions, since the beginning: what should not happen at every call.
inline int questions = 0;

inline const Device& device() { return devices[current]; }

inline void use_device(const Device& model) {
  for (current = 0; current < devices.size(); ++current) {
    if (devices[current] == model) return;
  }
  devices.push_back(model);
}

}  // namespace emulator

inline cudaError_t cudaGetDevice(int* device) {
  *device = static_cast<int>(emulator::current);
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++emulator::questions;
  const emulator::Device& of = emulator::devices[device];
  const int values[] = {of.multiprocessors, static_cast<int>(of.max_shared_bytes), static_cast<int>(of.clusters)};
  *value = values[attribute];
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::failure : "invalid argument";
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  ++emulator::questions;
  if (bytes < 0 || static_cast<size_t>(bytes) > emulator::device().max_shared_bytes) return cudaErrorInvalidValue;
  emulator::allowed_shared_bytes[{reinterpret_cast<const void*>(kernel), emulator::current}] = bytes;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  ++emulator::questions;
  attributes->ptxVersion = emulator::device().ptx_version;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

// Whether a launch asks for more shared memory than the kernel has been allowed on this device.
inline bool wants_too_much(const void* kernel, size_t bytes) {
  const auto allowed = allowed_shared_bytes.find({kernel, current});
  const size_t limit = allowed == allowed_shared_bytes.end() ? 0 : allowed->second;
  return bytes > (limit < kDefaultSharedBytes ? kDefaultSharedBytes : limit);
}

// Blocks in clusters that the device runs at a time; of compute capability 9.0's limits those that count.
inline unsigned blocks_together(size_t shared_bytes, unsigned threads) {
  const size_t by_memory = (device().max_shared_bytes + 1024) / (shared_bytes + 1024), by_threads = 2048 / threads;
  return device().for_clusters * static_cast<unsigned>(by_memory < by_threads ? by_memory : by_threads);
}

}  // namespace emulator

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(
    int* clusters, void (*kernel)(Parameters...), const cudaLaunchConfig_t* config) {
  ++emulator::questions;
  const bool known = emulator::device().for_clusters >= 0;
  if (!known || !emulator::device().clusters || config->numAttrs != 1) return cudaErrorInvalidValue;
  if (emulator::wants_too_much(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes)) {
    return cudaErrorInvalidValue;
  }
  const unsigned cluster = config->attrs[0].val.clusterDim.x;
  *clusters = emulator::blocks_together(config->dynamicSmemBytes, config->blockDim.x) / cluster;
  return cudaSuccess;
}

template <typename Parameter>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameter), const std::remove_const_t<Parameter>& parameter) {
  using namespace emulator;
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const size_t shared_bytes = config->dynamicSmemBytes;
  const unsigned together = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  if (grid.x == 0 || threads.x == 0 || threads.x > 1024 || threads.x % kWarp != 0) return cudaErrorInvalidValue;
  if (wants_too_much(reinterpret_cast<const void*>(kernel), shared_bytes)) return cudaErrorInvalidValue;
  const unsigned most = device().clusters ? kMaxCluster : 1;
  if (together == 0 || together > most || grid.x % together != 0) return cudaErrorInvalidValue;
  if (together > 1 && blocks_together(shared_bytes, threads.x) < together) return cudaErrorInvalidValue;
  const std::function<void()> body = [&] { kernel(parameter); };
  failure[0] = 0;
  written.clear();
  blockDim = threads;
  gridDim = grid;
  std::vector<std::unique_ptr<char[]>> stacks(together * threads.x);
  for (auto& stack : stacks) stack.reset(new char[kStackBytes]);
  for (unsigned first = 0; first < grid.x && failure[0] == 0; first += together) {
    Cluster state;
    cluster = &state;
    state.body = &body;
    state.blocks = std::vector<Block>(together);
    for (unsigned rank = 0; rank < together; ++rank) {
      Block& of = state.blocks[rank];
      of.index = first + rank;
      of.threads = std::vector<Thread>(threads.x);
      of.warps = std::vector<Meeting>(threads.x / kWarp);
      of.shared.assign(shared_bytes / 4, 0xffffffffu);
      of.words.assign(shared_bytes / 4, Word{});
      for (unsigned i = 0; i < threads.x; ++i) {
        of.threads[i].index = i;
        prepare(of.threads[i], stacks[rank * threads.x + i].get());
      }
    }
    run_cluster();
  }
  return failure[0] == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}

template <typename Parameter>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Parameter), dim3 grid, dim3 threads, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  const cudaLaunchConfig_t config = {grid, threads, shared_bytes, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, *static_cast<const std::remove_const_t<Parameter>*>(arguments[0]));
}
