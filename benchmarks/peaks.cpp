// What this processor can do at most: memory read, and products in float32, bfloat16 and int8, on N threads at once.
//
//     c++ -O3 -march=native -ffp-contract=fast -pthread peaks.cpp -o peaks && ./peaks 2 15
//
// One line of JSON: rates of each round in GB/s, GFLOP/s, GOP/s; a list is empty where there is no such instruction.

#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kReadBytes = std::size_t(256) << 20;
constexpr int kChains = 10;  // independent sums: at least latency times throughput, and they fit 16 registers
constexpr int kRepeats = 1000000;

std::atomic<std::uint64_t> sink;  // results go here, so that nothing is optimized away

// Keeps a value in a register and unknown to the compiler, so that no chain is folded into another.
template <class T>
inline void opaque(T& value) {
    asm volatile("" : "+x"(value));
}

using Bytes = std::uint64_t __attribute__((vector_size(32)));

double read_bytes(const char* begin, std::size_t nbytes) {
    const Bytes* at = reinterpret_cast<const Bytes*>(begin);
    Bytes sums[8] = {};
    for (std::size_t index = 0; index + 8 <= nbytes / sizeof(Bytes); index += 8)
        for (int chain = 0; chain < 8; ++chain) sums[chain] += at[index + chain];
    for (const Bytes& sum : sums) sink += sum[0];
    return double(nbytes);
}

template <class V, class Step>
double products(V start, double ops_per_step, Step step) {
    V sums[kChains];
    for (V& sum : sums) sum = start;
    for (int repeat = 0; repeat < kRepeats; ++repeat)
        for (V& sum : sums) step(sum);
    for (V& sum : sums) opaque(sum);
    return ops_per_step * kChains * kRepeats;
}

#if defined(__AVX512F__)
using Floats = __m512;
inline Floats ones() { return _mm512_set1_ps(1.0f); }
inline void fma(Floats& sum, Floats a, Floats b) { sum = _mm512_fmadd_ps(a, b, sum); }
#else
using Floats = __m256;
inline Floats ones() { return _mm256_set1_ps(1.0f); }
inline void fma(Floats& sum, Floats a, Floats b) { sum = _mm256_fmadd_ps(a, b, sum); }
#endif

double float32() {
    Floats a = ones(), b = ones();
    opaque(a), opaque(b);
    return products(ones(), sizeof(Floats) / 4 * 2, [&](Floats& sum) { fma(sum, a, b); });
}

#if defined(__AMX_BF16__)
struct __attribute__((packed)) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void begin_tiles() {
    static TileConfig config;
    _tile_loadconfig(&config);  // which zeroes all tiles
}

constexpr double kTileSteps = 4.0 * (kRepeats / 4);

double bfloat16() {
    begin_tiles();
    for (int repeat = 0; repeat < kRepeats / 4; ++repeat) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return kTileSteps * 16 * 16 * 32 * 2;
}
#elif defined(__AVX512BF16__)
double bfloat16() {
    __m512 bits = ones();
    opaque(bits);
    const __m512bh a = (__m512bh)bits;
    return products(ones(), 64, [&](__m512& sum) { sum = _mm512_dpbf16_ps(sum, a, a); });
}
#endif

#if defined(__AMX_INT8__)
double int8() {
    begin_tiles();
    for (int repeat = 0; repeat < kRepeats / 4; ++repeat) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return kTileSteps * 16 * 16 * 64 * 2;
}
#elif defined(__AVX512VNNI__)
double int8() {
    __m512i a = _mm512_set1_epi8(1);
    opaque(a);
    return products(a, 128, [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, a, a); });
}
#elif defined(__AVXVNNI__)
double int8() {
    __m256i a = _mm256_set1_epi8(1);
    opaque(a);
    return products(a, 64, [&](__m256i& sum) { sum = _mm256_dpbusd_avx_epi32(sum, a, a); });
}
#else
double int8() {  // without VNNI: three instructions for what it does in one
    __m256i a = _mm256_set1_epi8(1), units = _mm256_set1_epi16(1);
    opaque(a), opaque(units);
    return products(a, 64, [&](__m256i& sum) {
        __m256i pairs;  // in assembly, as compilers move one of the three out of the loop
        asm volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(a), "x"(units));
    });
}
#endif

// The rate of all threads together, in units of 1e9 a second, from the first one's start to the last one's end.
template <class Work>
double rate(int num_threads, Work work) {
    std::atomic<int> waiting{num_threads};
    std::vector<double> done(num_threads);
    std::vector<std::thread> threads;
    std::vector<std::chrono::steady_clock::time_point> begins(num_threads), ends(num_threads);
    for (int index = 0; index < num_threads; ++index)
        threads.emplace_back([&, index] {
            for (--waiting; waiting > 0;) _mm_pause();
            begins[index] = std::chrono::steady_clock::now();
            done[index] = work(index);
            ends[index] = std::chrono::steady_clock::now();
        });
    for (std::thread& thread : threads) thread.join();
    const std::chrono::duration<double> seconds =
        *std::max_element(ends.begin(), ends.end()) - *std::min_element(begins.begin(), begins.end());
    double total = 0;
    for (double each : done) total += each;
    return total / seconds.count() / 1e9;
}

void print(const char* name, const std::vector<double>& rates, const char* after) {
    std::string text;
    for (double each : rates) text += (text.empty() ? "" : ", ") + std::to_string(each);
    std::printf("\"%s\": [%s]%s", name, text.c_str(), after);
}

}  // namespace

int main(int count, char** arguments) {
    const int num_threads = count > 1 ? std::atoi(arguments[1]) : 1, rounds = count > 2 ? std::atoi(arguments[2]) : 9;
    char* memory = static_cast<char*>(
        mmap(nullptr, kReadBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) return std::perror("peaks: 256 MiB of memory"), 1;
    madvise(memory, kReadBytes, MADV_HUGEPAGE);
    std::fill(memory, memory + kReadBytes, 1);
    const std::size_t share = kReadBytes / num_threads / 4096 * 4096;
#if defined(__AMX_BF16__)
    syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
#endif
    std::vector<double> reads, floats, bfloats, ints;
    for (int round = 0; round < rounds; ++round) {
        reads.push_back(rate(num_threads, [&](int index) { return read_bytes(memory + index * share, share); }));
        floats.push_back(rate(num_threads, [](int) { return float32(); }));
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
        bfloats.push_back(rate(num_threads, [](int) { return bfloat16(); }));
#endif
        ints.push_back(rate(num_threads, [](int) { return int8(); }));
    }
    std::printf("{");
    print("read_gb_s", reads, ", ");
    print("float32_gflops", floats, ", ");
    print("bfloat16_gflops", bfloats, ", ");
    print("int8_gops", ints, "}\n");
}
