// Tokens quantized to int8 for products with quantized weights: x = scale * q, a scale for each 32 columns, |q| <= 127.
// Knows no kind of matrix.
//
// Prepared tokens are blocks of up to kBlockTokens; a block is units of 32 columns in order, a unit tiles of tokens in order.
// A tile is words of 4 bytes, each for all its tokens: 8 words of q (columns 4 j to 4 j + 3), the scale, the sums of q of both
// halves (a pair of int16), and, times the scale, the sum of q, that of the first half, and that of the second. A tile for
// AMX has the 8 words of q token by token.
//
// A token that holds NaN or an infinity has NaN for a scale there, and so in its results, and in no other token's.
#pragma once
#include "linear.h"
#include "quant_kinds.h"

namespace SHUTEYE_ISA {

constexpr int64_t kBlockTokens = 64;  // whose sums and quantized numbers stay near while weights pass
constexpr int64_t kPreparedTokens = 8; // what a thread prepares at a time
constexpr int64_t kUnitWords = 13;
constexpr int64_t kNumberWords = 8; // of q
#if defined(SHUTEYE_AMX_INT8)
constexpr int kMatrixTokens = 16; // of a tile for AMX
constexpr int kTileTokens = kMatrixTokens;
#else
constexpr int kMatrixTokens = 0; // there are none
constexpr int kTileTokens = kVectorTokens;
#endif
enum Word : int { kScaleWord = 8, kPairWord = 9, kSumWord = 10, kHalfSumWord = 11 };

// `tokens` tokens of one unit.
template <int tokens>
struct TokenTile {
  const int32_t* words;

  Lanes floats(int word, int token) const {
    float value;
    memcpy(&value, words + word * tokens + token, sizeof value);
    return broadcast(value);
  }
  Ints pair_of_sums(int token) const { return broadcast_int(words[kPairWord * tokens + token]); }
};

// body(Constant<tokens of the tile>, first token): as large as possible, halved at the end.
template <int most = kTileTokens, class Body>
inline void each_tile_of_tokens(int64_t num_tokens, const Body& body, int64_t first = 0) {
  for (; num_tokens - first >= most; first += most) body(Constant<most>{}, first);
  if constexpr (most > 1) each_tile_of_tokens<most / 2>(num_tokens, body, first);
}

struct TokenBlock {
  const int32_t* words;
  int64_t first_token;
  int64_t num_tokens;

  TokenBlock(const Linear& linear, const void* prepared, int64_t first)
      : first_token(first), num_tokens(smaller(kBlockTokens, linear.num_tokens - first)) {
    words = static_cast<const int32_t*>(prepared) + first * (linear.in_features / kUnitColumns) * kUnitWords;
  }
  template <int tokens>
  TokenTile<tokens> tile(int64_t unit, int64_t first) const {
    return {words + (unit * num_tokens + first) * kUnitWords};
  }
};

// 32 numbers of one token.
struct QuantizedUnit {
  int8_t q[kUnitColumns];
  float scale;
  float sums[2];

  explicit QuantizedUnit(const float* x) {
    constexpr int vectors = kUnitColumns / Lanes::width;
    Lanes numbers[vectors];
    Lanes most = broadcast(0.0f), broken = broadcast(0.0f);
    for (int index = 0; index < vectors; index++) {
      numbers[index] = load(x + index * Lanes::width);
      most = max(most, max(numbers[index], broadcast(0.0f) - numbers[index]));
      broken = fma(numbers[index], broadcast(0.0f), broken); // NaN, if a number is NaN or infinite
    }
    constexpr float smallest = 1e-30f; // what is smaller is taken for 0, so that the inverse is finite
    const float range = largest(most);
    const bool is_sound = sum(broken) == 0.0f && range >= smallest;
    const Lanes inverse = broadcast(is_sound ? 127.0f / range : 0.0f);
    scale = is_sound ? range / 127.0f : sum(broken);
    for (int half = 0; half < 2; half++) {
      Lanes total = broadcast(0.0f);
      for (int index = half * vectors / 2; index < (half + 1) * vectors / 2; index++) {
        const Lanes whole = is_sound ? nearest_integer(numbers[index] * inverse) : broadcast(0.0f);
        store_whole(q + index * Lanes::width, whole);
        total = total + whole;
      }
      sums[half] = sum(total);
    }
  }

  // As token `own` of a tile.
  void place(int32_t* words, int64_t own, int64_t tokens) const {
    if (tokens == kMatrixTokens) {
      memcpy(words + own * kNumberWords, q, sizeof q);
    } else {
      for (int64_t word = 0; word < kNumberWords; word++) memcpy(words + word * tokens + own, q + 4 * word, 4);
    }
    words += own;
    const auto low = static_cast<int32_t>(sums[0]), high = static_cast<int32_t>(sums[1]);
    const float scaled[3] = {scale * (sums[0] + sums[1]), scale * sums[0], scale * sums[1]};
    memcpy(words + kScaleWord * tokens, &scale, 4);
    words[kPairWord * tokens] = static_cast<int32_t>(static_cast<uint32_t>(high) << 16 | (static_cast<uint32_t>(low) & 0xffffu));
    for (int64_t index = 0; index < 3; index++) memcpy(words + (kSumWord + index) * tokens, &scaled[index], 4);
  }
};

inline int64_t prepared_tiles(const Linear& linear) { return (linear.num_tokens + kPreparedTokens - 1) / kPreparedTokens; }

template <class T>
void quantize_token(const Linear& linear, int32_t* words, int64_t own, int64_t tokens, int64_t token, int64_t unit_words,
                    float* row) {
  copy_row<T>(linear, token, row, linear.in_features);
  for (int64_t unit = 0; unit < linear.in_features / kUnitColumns; unit++) {
    QuantizedUnit(row + unit * kUnitColumns).place(words + unit * unit_words, own, tokens);
  }
}

// scratch: a row of floats.
inline void quantize_tokens(const Linear& linear, void* prepared, void* scratch, int64_t first_tile, int64_t end_tile) {
  const int64_t first = first_tile * kPreparedTokens, end = smaller(end_tile * kPreparedTokens, linear.num_tokens);
  for (int64_t block_first = first / kBlockTokens * kBlockTokens; block_first < end; block_first += kBlockTokens) {
    const TokenBlock block(linear, prepared, block_first);
    each_tile_of_tokens(block.num_tokens, [&](auto constant, int64_t tile_first) {
      constexpr int tokens = decltype(constant)::value;
      for (int64_t own = 0; own < tokens; own++) {
        const int64_t token = block_first + tile_first + own;
        if (token < first || token >= end) continue;
        auto* words = const_cast<int32_t*>(block.words) + tile_first * kUnitWords;
        const auto quantize = linear.dtype == SHUTEYE_BFLOAT16 ? quantize_token<bf16> : quantize_token<float>;
        quantize(linear, words, own, tokens, token, block.num_tokens * kUnitWords, static_cast<float*>(scratch));
      }
    });
  }
}

} // namespace SHUTEYE_ISA
