// See decoder.h. Phases of a layer: query, key and value heads with cache writes | attention | output projection |
// gate and up | down. Each needs all of the one before. In a step of many tokens, packing them for a product is a phase
// of its own before it; else every thread packs the few tokens that there are for itself.
//
// Among ranks, output projection and down give this rank's part of a sum. One thread waits for the other ranks, outside of
// any job, so that the pool's threads sleep if it takes long; the next job begins with the sum.
#include "decoder.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace shuteye {
namespace {

constexpr int64_t kPhasesPerLayer = 9; // two for each product, one for attention
constexpr int64_t kLeastUnits = 8;      // of many tokens: fewer rows at a time would read the tokens too often
constexpr int64_t kSumElements = 1024;  // of a sum over ranks: what a thread takes at a time

int64_t larger(int64_t left, int64_t right) { return left > right ? left : right; }
int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

bool all_below(const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t index = 0; index < count; index++)
    if (values[index] < 0 || values[index] >= limit) return false;
  return true;
}

} // namespace

const char* check_sequences(const ShuteyeSequences& sequences, const ShuteyeCache& cache, int64_t num_tokens) {
  if (sequences.query_starts[0] != 0 || sequences.query_starts[sequences.num_sequences] != num_tokens)
    return "query_starts do not cover the tokens";
  for (int64_t index = 0; index < sequences.num_sequences; index++) {
    const int64_t count = sequences.query_starts[index + 1] - sequences.query_starts[index];
    const int64_t context = sequences.context_lengths[index];
    if (count < 1 || context < count) return "a context is shorter than its sequence's tokens";
    const int64_t num_blocks = (context + cache.block_size - 1) / cache.block_size;
    if (!all_below(sequences.tables + sequences.table_starts[index], num_blocks, cache.num_blocks))
      return "a block table names a block that the cache does not have";
  }
  return nullptr;
}

Decoder::Buffer::~Buffer() { free(data); }

void Decoder::Buffer::reserve(int64_t nbytes) {
  constexpr int64_t kHugePage = 2 << 20;
  if (size >= nbytes) return;
  free(data);
  data = nullptr; // in case there is no memory
  const int64_t alignment = nbytes >= kHugePage / 2 ? kHugePage : 64;
  size = round_up(nbytes, alignment);
  data = aligned_alloc(alignment, size);
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(data, size, MADV_HUGEPAGE); // advice: without it the tiles are only slower to read
#endif
}

Decoder::Decoder(const ShuteyeModel& model)
    : model_(model),
      layers_(model.layers, model.layers + model.num_layers),
      num_all_heads_(model.num_heads + 2 * model.cache.num_kv_heads),
      itemsize_(model.dtype == SHUTEYE_BFLOAT16 ? 2 : 4),
      num_phases_(kPhasesPerLayer * model.num_layers + 2) {
  const int64_t rows = model.max_tokens * itemsize_, head_dim = model.cache.head_dim;
  hidden_.reserve(rows * model.hidden);
  last_.reserve(rows * model.hidden);
  qkv_.reserve(rows * num_all_heads_ * head_dim);
  const int64_t packed_rows = round_up(model.max_tokens, 16) * itemsize_;
  attended_.reserve(packed_rows * model.num_heads * head_dim);
  activated_.reserve(packed_rows * model.intermediate);
  phases_.reset(new Phase[num_phases_]);
}

const char* Decoder::check(const ShuteyeStep& step) const {
  if (step.num_tokens < 1 || step.num_tokens > model_.max_tokens) return "more tokens than max_tokens, or none";
  if (step.num_sampled > step.num_tokens) return "more wanted tokens than there are";
  if (model_.num_embeddings && !all_below(step.token_ids, step.num_tokens, model_.num_embeddings))
    return "a token id is not in the vocabulary";
  if (!model_.num_embeddings && !step.hidden_in) return "there is nothing to begin with";
  if (!model_.vocab && !step.hidden_out) return "there is no place for the result";
  if (!all_below(step.slots, step.num_tokens, model_.cache.num_blocks * model_.cache.block_size))
    return "a slot is not in the cache";
  if (!all_below(step.wanted, step.num_sampled, step.num_tokens)) return "a wanted token is not in the step";
  return check_sequences(step.sequences, model_.cache, step.num_tokens);
}

const char* Decoder::run(ShuteyeStep& step) {
  if (const char* wrong = check(step)) return wrong;
  std::lock_guard<std::mutex> guard(one_step_);
  table_ = &active_table();
  num_threads_ = pool_num_threads();
  step_ = &step;
  reserve_scratch();
  for (int64_t index = 0; index < num_phases_; index++) phases_[index].reset();
  const int64_t group = model_.num_heads / model_.cache.num_kv_heads;
  tasks_.plan(step.sequences, model_.cache, model_.num_heads, table_->joined_heads(model_.dtype, model_.cache, group));
  embed(step);
  group_ = static_cast<Group*>(step.group);
  step.aborted = 0;
  if (group_) {
    step.aborted = !run_among_ranks();
  } else {
    pool_run([](void* self, int thread) { static_cast<Decoder*>(self)->work(thread); }, this);
  }
  if (!model_.vocab) memcpy(step.hidden_out, hidden_.data, step.num_tokens * model_.hidden * itemsize_);
  return nullptr;
}

// False: the group was aborted; what the step was to fill is undefined.
bool Decoder::run_among_ranks() {
  if (group_->aborted()) return false; // before the slot is written, which others may be reading still
  const int64_t num_blocks = 2 * model_.num_layers;
  before_ = ShuteyeReduce{};
  for (block_ = 0; block_ <= num_blocks; block_++) {
    const bool is_last = block_ == num_blocks || (narrows(block_ / 2) && step_->num_sampled == 0);
    if (!is_last) {
      sum_ = sum_after(block_);
      const bool fits = group_->fits(sum_);
      if (!fits) part_.reserve(model_.max_tokens * model_.hidden * static_cast<int64_t>(sizeof(float)));
      sum_.part = fits ? nullptr : part_.data;
      own_part_ = fits ? group_->slot() : part_.data;
    }
    sum_phase_.reset();
    pool_run([](void* self, int thread) { static_cast<Decoder*>(self)->work_between_sums(thread); }, this);
    if (is_last) break;
    if (!(sum_.part ? group_->reduce(sum_) : group_->begin(sum_))) return false;
    before_ = sum_;
  }
  return true;
}

ShuteyeReduce Decoder::sum_after(int64_t block) const {
  const bool narrow = narrows(block / 2), narrows_here = narrow && block % 2 == 0;
  ShuteyeReduce sum{};
  sum.dtype = model_.dtype;
  sum.part_dtype = SHUTEYE_FLOAT32;
  sum.rows = narrow ? step_->num_sampled : step_->num_tokens;
  sum.width = model_.hidden;
  sum.out = narrow ? last_.data : hidden_.data;
  sum.residual = narrows_here ? hidden_.data : sum.out;
  sum.residual_rows = narrows_here ? step_->wanted : nullptr;
  return sum;
}

// As much as this step needs; an engine that decodes a few sequences never holds the memory of a long prefill.
void Decoder::reserve_scratch() {
  const int64_t widest = larger(larger(model_.hidden, model_.intermediate), model_.num_heads * model_.cache.head_dim);
  const bool many = table_->takes_many(linear(widest, nullptr, nullptr, nullptr, 0, nullptr));
  const int64_t few = many ? smaller(step_->num_sampled, table_->many_tokens) : step_->num_tokens;
  int64_t nbytes = larger(linear_scratch_bytes(few, widest), attention_scratch_bytes(model_.cache.head_dim));
  if (many) nbytes = larger(nbytes, many_scratch_bytes(step_->num_tokens, widest));
  for (int thread = 0; thread < num_threads_; thread++) scratch_[thread].reserve(nbytes);
  if (many) packed_.reserve(packed_bytes(step_->num_tokens, widest));
}

// Whether what is made for this product may be written as it wants it, instead of being packed afterwards.
bool Decoder::wants_packed(const Linear& linear) const {
  return table_->takes_many(linear) && !linear.rows && linear.in_features % 32 == 0 && model_.cache.head_dim % 16 == 0;
}

void Decoder::embed(const ShuteyeStep& step) {
  const int64_t nbytes = model_.hidden * itemsize_;
  if (!model_.num_embeddings) {
    memcpy(hidden_.data, step.hidden_in, step.num_tokens * nbytes);
    return;
  }
  for (int64_t token = 0; token < step.num_tokens; token++) {
    memcpy(static_cast<char*>(hidden_.data) + token * nbytes,
           static_cast<const char*>(model_.embedding) + step.token_ids[token] * nbytes, nbytes);
  }
}

void Decoder::work(int thread) {
  if (thread >= num_threads_) return; // the pool grew since this step began
  table_->enter();
  for (int64_t index = 0; index < model_.num_layers; index++) {
    attention_block(index, thread);
    mlp_block(index, thread);
  }
  logits(thread, &phases_[num_phases_ - 2]);
  table_->leave();
}

void Decoder::work_between_sums(int thread) {
  if (thread >= num_threads_) return;
  table_->enter();
  const int64_t count = before_.part ? 0 : before_.rows * before_.width; // one with a part is made already
  sum_phase_.run((count + kSumElements - 1) / kSumElements, num_threads_, [&](int64_t first, int64_t end) {
    group_->sum(before_, first * kSumElements, smaller(end * kSumElements, count));
  });
  const int64_t index = block_ / 2;
  if (index == model_.num_layers) {
    logits(thread, &phases_[num_phases_ - 2]);
  } else if (block_ % 2 == 0) {
    attention_block(index, thread);
  } else {
    mlp_block(index, thread);
  }
  table_->leave();
}

Linear Decoder::linear(int64_t in_features, const void* x, const void* weight, const void* bias, int64_t out_features,
                       void* out) const {
  Linear linear{};
  linear.dtype = model_.dtype;
  linear.num_tokens = step_->num_tokens;
  linear.in_features = in_features;
  linear.out_features = out_features;
  linear.x = x;
  linear.eps = static_cast<float>(model_.eps);
  linear.weight = weight;
  linear.bias = bias;
  linear.out = out;
  linear.out_stride = out_features;
  linear.finish = Finish::store;
  return linear;
}

void Decoder::product(Linear linear, int thread, Phase* phases) {
  linear.unit_rows = table_->unit_rows_of(linear);
  compute(linear, thread, phases, [](int64_t, int64_t) {});
}

// A product that is added to the hidden states; among ranks, this rank's part of it.
void Decoder::add(Linear linear, int thread, Phase* phases) {
  linear.finish = group_ ? Finish::store_part : Finish::add;
  if (group_) linear.out = own_part_;
  product(linear, thread, phases);
}

// phases[0] packs many tokens, phases[1] computes units of rows; then(first, end) follows on each share of them.
template <class Then>
void Decoder::compute(const Linear& linear, int thread, Phase* phases, const Then& then) {
  void* scratch = scratch_[thread].data;
  const bool many = table_->takes_many(linear);
  if (many && !linear.x_is_packed) {
    phases[0].run((linear.num_tokens + 15) / 16, num_threads_, [&](int64_t first, int64_t end) {
      table_->pack_tokens(linear, packed_.data, scratch, first, end);
    });
  }
  const int64_t unit_rows = linear.unit_rows, num_units = (linear.out_features + unit_rows - 1) / unit_rows;
  bool prepared = false;
  const auto rows = [&](int64_t first, int64_t end) {
    const int64_t end_row = smaller(end * unit_rows, linear.out_features);
    if (many) {
      table_->many_rows(linear, linear.x_is_packed ? linear.x : packed_.data, scratch, first * unit_rows, end_row);
    } else {
      if (!prepared) table_->prepare(linear, scratch);
      prepared = true;
      table_->linear_rows(linear, scratch, first * unit_rows, end_row);
    }
    then(first, end);
  };
  phases[1].run(num_units, num_threads_, rows, many ? larger(int64_t{1}, kLeastUnits * kTileRows / unit_rows) : 1);
}

void Decoder::attention_block(int64_t index, int thread) {
  const ShuteyeLayer& own = layers_[index];
  const bool narrow = narrows(index);
  Phase* phases = &phases_[index * kPhasesPerLayer];
  query_key_value(index, thread, phases);
  if (narrow && step_->num_sampled == 0) return; // keys and values are written; nothing else is wanted
  Linear output = linear(model_.num_heads * model_.cache.head_dim, attended_.data, own.output_weight, own.output_bias,
                         model_.hidden, narrow ? last_.data : hidden_.data);
  output.num_tokens = narrow ? step_->num_sampled : step_->num_tokens;
  output.rows = narrow ? step_->wanted : nullptr;
  output.residual = hidden_.data;
  output.x_is_packed = wants_packed(output);
  attention(index, thread, phases[2], output.x_is_packed);
  add(output, thread, phases + 3);
}

void Decoder::mlp_block(int64_t index, int thread) {
  const ShuteyeLayer& own = layers_[index];
  const bool narrow = narrows(index);
  if (narrow && step_->num_sampled == 0) return;
  Phase* phases = &phases_[index * kPhasesPerLayer];
  void* hidden = narrow ? last_.data : hidden_.data;
  const int64_t num_tokens = narrow ? step_->num_sampled : step_->num_tokens;
  Linear gate_up = linear(model_.hidden, hidden, own.gate_up_weight, own.gate_up_bias, model_.intermediate,
                          activated_.data);
  gate_up.num_tokens = num_tokens;
  gate_up.norm = own.post_norm;
  Linear down = linear(model_.intermediate, activated_.data, own.down_weight, own.down_bias, model_.hidden, hidden);
  down.num_tokens = num_tokens;
  down.residual = hidden;
  down.x_is_packed = wants_packed(down);
  gate_up.finish = Finish::silu_mul;
  gate_up.packs_out = down.x_is_packed;
  product(gate_up, thread, phases + 5);
  add(down, thread, phases + 7);
}

void Decoder::query_key_value(int64_t index, int thread, Phase* phases) {
  const ShuteyeLayer& own = layers_[index];
  const int64_t head_dim = model_.cache.head_dim;
  Linear heads = linear(model_.hidden, hidden_.data, own.qkv_weight, own.qkv_bias, num_all_heads_ * head_dim, qkv_.data);
  heads.norm = own.input_norm;
  const ShuteyeRope rope{model_.dtype,   step_->num_tokens, model_.num_heads, index,     model_.eps,   qkv_.data,
                         own.query_norm, own.key_norm,      step_->cos,       step_->sin, step_->slots, model_.cache};
  heads.unit_rows = head_dim;
  compute(heads, thread, phases,
          [&](int64_t first, int64_t end) { table_->rope_heads[model_.dtype](rope, first, end); });
}

void Decoder::attention(int64_t index, int thread, Phase& phase, bool packs_out) {
  const ShuteyeAttention attention{model_.dtype,
                                   model_.num_heads,
                                   num_all_heads_ * model_.cache.head_dim,
                                   index,
                                   layers_[index].window,
                                   model_.scale,
                                   qkv_.data,
                                   attended_.data,
                                   model_.cache,
                                   step_->sequences,
                                   packs_out};
  phase.run(tasks_.size(), num_threads_, [&](int64_t first, int64_t end) {
    tasks_.run(*table_, attention, scratch_[thread].data, first, end);
  });
}

void Decoder::logits(int thread, Phase* phases) {
  if (!model_.vocab || step_->num_sampled == 0) return;
  Linear head = linear(model_.hidden, last_.data, model_.head_weight, model_.head_bias, model_.vocab, step_->logits);
  head.num_tokens = step_->num_sampled;
  head.norm = model_.final_norm;
  head.finish = Finish::store_float;
  product(head, thread, phases);
}

} // namespace shuteye
