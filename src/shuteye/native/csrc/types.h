// Plain data that crosses the C ABI. Knows no instruction set and no thread. library.py mirrors these structs.
#pragma once
#include <cstdint>

extern "C" {

enum ShuteyeDtype : int64_t { SHUTEYE_FLOAT32 = 0, SHUTEYE_BFLOAT16 = 1 };

// What a KV cache holds: the model's dtype, or one of the last three.
enum ShuteyeCacheDtype : int64_t {
  SHUTEYE_CACHE_FLOAT32 = 0,
  SHUTEYE_CACHE_BFLOAT16 = 1,
  SHUTEYE_CACHE_FLOAT16 = 2,
  SHUTEYE_CACHE_INT8 = 3,
};

// How a weight matrix lies in memory; docs/matrices.md has the bytes, matrices/kinds.py the same numbers.
enum ShuteyeKind : int64_t {
  SHUTEYE_ROWS = 0, // row-major, of the model's dtype
  SHUTEYE_BF16 = 1, // panels of 32 rows of bfloat16
  SHUTEYE_Q8_0 = 2, // from here on quantized: panels of 16 rows
  SHUTEYE_Q4_0 = 3,
  SHUTEYE_Q4_1 = 4,
  SHUTEYE_Q5_0 = 5,
  SHUTEYE_Q5_1 = 6,
  SHUTEYE_IQ4_NL = 7,
  SHUTEYE_Q2_K = 8,
  SHUTEYE_Q3_K = 9,
  SHUTEYE_Q4_K = 10,
  SHUTEYE_Q5_K = 11,
  SHUTEYE_Q6_K = 12,
  SHUTEYE_IQ4_XS = 13,
  SHUTEYE_INT4 = 14,
  SHUTEYE_INT8 = 15,
};

enum ShuteyeScale : int64_t { SHUTEYE_SCALE_F32 = 0, SHUTEYE_SCALE_BF16 = 1, SHUTEYE_SCALE_F16 = 2 };

// y = x @ W^T + bias, W [rows, columns].
struct ShuteyeMatrix {
  const void* data; // null: there is no such matrix
  int64_t kind;
  int64_t rows;
  int64_t columns;
  int64_t group;       // of int4 and int8: columns that share a scale; 0: all of a row
  int64_t scale_dtype; // likewise
  int64_t has_zeros;   // likewise
  const void* bias;    // [rows] of the model's dtype, or null
};

// Weights of one layer; a pointer that may be null says so.
struct ShuteyeLayer {
  const void* input_norm;   // [hidden]
  ShuteyeMatrix query;      // [num_heads * head_dim, hidden]
  ShuteyeMatrix key;        // [num_kv_heads * head_dim, hidden]
  ShuteyeMatrix value;      // likewise
  const void* query_norm;   // [head_dim] or null
  const void* key_norm;     // [head_dim] or null
  ShuteyeMatrix output;     // [hidden, num_heads * head_dim]
  const void* post_norm;    // [hidden]
  ShuteyeMatrix gate;       // [intermediate, hidden]
  ShuteyeMatrix up;         // likewise
  ShuteyeMatrix down;       // [hidden, intermediate]
  int64_t window;           // positions a query sees, itself included; 0: all
};

// [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] of dtype; after the last three dimensions of int8 their
// scales, float [num_kv_heads, block_size].
struct ShuteyeCache {
  void* base;
  int64_t dtype; // of ShuteyeCacheDtype
  int64_t num_blocks;
  int64_t num_layers;
  int64_t block_size;
  int64_t num_kv_heads;
  int64_t head_dim;
};

// A whole model, or one rank's part of it: its layers, heads and rows.
struct ShuteyeModel {
  int64_t dtype;
  int64_t hidden;
  int64_t num_layers;
  int64_t num_heads;
  int64_t intermediate;
  int64_t max_tokens;
  double eps;
  double scale;
  ShuteyeMatrix embedding; // [vocabulary, hidden]; none: begins with hidden states
  const void* final_norm;  // [hidden]; of the head
  ShuteyeMatrix head;      // [rows of the vocabulary, hidden]; none: ends with hidden states
  const ShuteyeLayer* layers;
  ShuteyeCache cache;
};

// Sequence i owns tokens [query_starts[i], query_starts[i + 1]), the last of its context_lengths[i] tokens; its blocks
// are tables[table_starts[i]], ... at least ceil(context_length / block_size) of them.
struct ShuteyeSequences {
  int64_t num_sequences;
  const int64_t* query_starts;    // [num_sequences + 1]
  const int64_t* context_lengths; // [num_sequences]
  const int64_t* table_starts;    // [num_sequences]
  const int64_t* tables;
};

struct ShuteyeStep {
  int64_t num_tokens;
  int64_t num_sampled;
  const int64_t* token_ids; // [num_tokens]; without embeddings not used
  const void* cos;          // [num_tokens, head_dim], the model's dtype
  const void* sin;          // likewise, no sign applied
  const int64_t* slots;     // [num_tokens]; block * block_size + offset
  const int64_t* wanted;    // [num_sampled]; token indices
  float* logits;            // [num_sampled, rows of the head]
  ShuteyeSequences sequences;
  const void* hidden_in;    // [num_tokens, hidden], if there are no embeddings
  void* hidden_out;         // likewise, if there is no head
  void* group;              // a shuteye::Group of the ranks that add up their parts, or null
  int64_t aborted;          // out: the group was aborted, and there is no result
};

struct ShuteyeRope {
  int64_t dtype;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t layer;
  double eps;
  void* qkv;              // [num_tokens, num_heads + 2 * num_kv_heads, head_dim]; the query heads are rotated in place
  const void* query_norm; // or null
  const void* key_norm;   // or null
  const void* cos;
  const void* sin;
  const int64_t* slots;
  ShuteyeCache cache;
};

struct ShuteyeAttention {
  int64_t dtype;
  int64_t num_heads;
  int64_t query_stride; // elements from one token's first query head to the next token's
  int64_t layer;
  int64_t window; // 0: none
  double scale;
  const void* query; // [num_tokens, num_heads, head_dim], with query_stride
  void* out;         // [num_tokens, num_heads, head_dim], contiguous, unless it is packed
  ShuteyeCache cache;
  ShuteyeSequences sequences;
  int64_t packs_out; // not 0: out is written as products of many tokens want it, see packed_offset
};

// out = residual + (the ranks' parts, added in rank order as float32, + bias), with every operand rounded to dtype first as
// the decoder does within one rank. [rows, width], all contiguous.
struct ShuteyeReduce {
  int64_t dtype;      // of bias, residual and out
  int64_t part_dtype; // of the parts: float32, or dtype
  int64_t rows;
  int64_t width;
  const void* part;             // this rank's, or null: it lies in the rank's slot already
  const void* bias;             // [width] or null
  const void* residual;         // [*, width] or null
  const int64_t* residual_rows; // [rows], which rows of residual are meant; null: the first ones
  void* out;                    // may be part; may be residual unless residual_rows are given
};

// Why a group was aborted.
struct ShuteyeFault {
  int64_t by;       // the rank; the group's size: one that is no rank
  uint64_t missing; // bit r: rank r had not come when a deadline passed
  char reason[496]; // ends with 0
};

// What is at the beginning of a group's memory, written once; the rest is group.cpp's own.
struct ShuteyeRegion {
  uint64_t magic;
  int64_t version;
  int64_t epoch;
  int64_t size;
  int64_t slot_bytes;
  int64_t message_bytes;
  int64_t nbytes;
};
}
