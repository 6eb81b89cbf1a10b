// See decoder.h. Phases of a layer: query, key and value heads with cache writes | attention | output projection |
// gate and up | down. Each needs all of the one before. In a step of many tokens, preparing them for a product is a phase
// of its own before it; else every thread prepares the few tokens that there are for itself.
//
// Among ranks, output projection and down give this rank's part of a sum. One thread waits for the other ranks, outside of
// any job, so that the pool's threads sleep if it takes long; the next job begins with the sum.
#include "decoder.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "embedding.h"

namespace shuteye {
namespace {

constexpr int64_t kPhasesPerLayer = 10; // two for each product, one for attention, one for gate and up
constexpr int64_t kManyTokens = 32;     // are prepared once for all threads
constexpr int64_t kSumElements = 1024;  // of a sum over ranks: what a thread takes at a time

int64_t larger(int64_t left, int64_t right) { return left > right ? left : right; }
int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

bool all_below(const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t index = 0; index < count; index++)
    if (values[index] < 0 || values[index] >= limit) return false;
  return true;
}

// body(part, first, end) for the parts of [first, end), where part i has sizes[i] of the units, one part after the other.
template <class Body>
void each_part(const int64_t* sizes, int64_t count, int64_t first, int64_t end, const Body& body) {
  for (int64_t part = 0; part < count && end > 0; part++) {
    if (first < sizes[part]) body(part, larger(first, int64_t{0}), smaller(end, sizes[part]));
    first -= sizes[part];
    end -= sizes[part];
  }
}

int64_t least_common_multiple(int64_t left, int64_t right) {
  int64_t result = left;
  while (result % right) result += left;
  return result;
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
      widest_(larger(larger(model.hidden, model.intermediate), model.num_heads * model.cache.head_dim)),
      num_phases_(kPhasesPerLayer * model.num_layers + 3) {
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
  const bool embeds = model_.embedding.data;
  if (embeds && !all_below(step.token_ids, step.num_tokens, model_.embedding.rows))
    return "a token id is not in the vocabulary";
  if (!embeds && !step.hidden_in) return "there is nothing to begin with";
  if (!model_.head.data && !step.hidden_out) return "there is no place for the result";
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
  if (!model_.embedding.data) memcpy(hidden_.data, step.hidden_in, step.num_tokens * model_.hidden * itemsize_);
  group_ = static_cast<Group*>(step.group);
  step.aborted = 0;
  if (group_) {
    step.aborted = !run_among_ranks();
  } else {
    pool_run([](void* self, int thread) { static_cast<Decoder*>(self)->work(thread); }, this);
  }
  if (!model_.head.data) memcpy(step.hidden_out, hidden_.data, step.num_tokens * model_.hidden * itemsize_);
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
  const int64_t num_tokens = step_->num_tokens;
  const int64_t product = own_tokens_bytes() + linear_scratch_bytes(num_tokens, widest_);
  const int64_t nbytes = larger(product, attention_scratch_bytes(model_.cache.head_dim));
  for (int thread = 0; thread < num_threads_; thread++) scratch_[thread].reserve(nbytes);
  if (num_tokens >= kManyTokens) prepared_.reserve(kNumForms * prepared_bytes(num_tokens, widest_));
  for (const ShuteyeLayer& layer : layers_) {
    if (form_of(layer.gate.kind) == form_of(layer.up.kind)) continue;
    gate_up_.reserve(model_.max_tokens * 2 * model_.intermediate * itemsize_);
  }
}

// Of scratch: what a thread prepares of few tokens for itself; several forms of fewer than many.
int64_t Decoder::own_tokens_bytes() const { return kNumForms * prepared_bytes(smaller(step_->num_tokens, kManyTokens), widest_); }

// Whether what is made for this product may be written as it is prepared.
bool Decoder::takes_packed(const Linear& linear) const {
  return table_->takes_packed(linear) && !linear.rows && linear.in_features % 32 == 0 && model_.cache.head_dim % 16 == 0;
}

void Decoder::embed(int64_t first, int64_t end) {
  const int64_t nbytes = model_.hidden * itemsize_;
  for (int64_t token = first; token < end; token++) {
    embed_row(*table_, model_.dtype, model_.embedding, step_->token_ids[token], static_cast<char*>(hidden_.data) + token * nbytes);
  }
}

void Decoder::begin() {
  if (!model_.embedding.data) return;
  phases_[num_phases_ - 1].run(step_->num_tokens, num_threads_, [&](int64_t first, int64_t end) { embed(first, end); });
}

void Decoder::work(int thread) {
  if (thread >= num_threads_) return; // the pool grew since this step began
  table_->enter();
  begin();
  for (int64_t index = 0; index < model_.num_layers; index++) {
    attention_block(index, thread);
    mlp_block(index, thread);
  }
  logits(thread, &phases_[num_phases_ - 3]);
  table_->leave();
}

void Decoder::work_between_sums(int thread) {
  if (thread >= num_threads_) return;
  table_->enter();
  const int64_t count = before_.part ? 0 : before_.rows * before_.width; // one with a part is made already
  sum_phase_.run((count + kSumElements - 1) / kSumElements, num_threads_, [&](int64_t first, int64_t end) {
    group_->sum(before_, first * kSumElements, smaller(end * kSumElements, count));
  });
  if (block_ == 0) begin();
  const int64_t index = block_ / 2;
  if (index == model_.num_layers) {
    logits(thread, &phases_[num_phases_ - 3]);
  } else if (block_ % 2 == 0) {
    attention_block(index, thread);
  } else {
    mlp_block(index, thread);
  }
  table_->leave();
}

Linear Decoder::linear(const ShuteyeMatrix& weight, const void* x, void* out) const {
  Linear linear{};
  linear.dtype = model_.dtype;
  linear.num_tokens = step_->num_tokens;
  linear.in_features = weight.columns;
  linear.out_features = weight.rows;
  linear.x = x;
  linear.eps = static_cast<float>(model_.eps);
  linear.weight = weight;
  linear.out = out;
  linear.out_stride = weight.rows;
  linear.finish = Finish::store;
  return linear;
}

void Decoder::product(const Linear& linear, int thread, Phase* phases) {
  Products products;
  products.add(linear, share_rows(linear.weight.kind));
  compute(products, thread, phases, [](int64_t, int64_t, int64_t) {});
}

// A product that is added to the hidden states; among ranks, this rank's part of it.
void Decoder::add(Linear linear, int thread, Phase* phases) {
  linear.finish = group_ ? Finish::store_part : Finish::add;
  if (group_) linear.out = own_part_;
  product(linear, thread, phases);
}

// phases[0] prepares many tokens, phases[1] computes rows; then(part, first_row, end_row) follows on each share of them.
template <class Then>
void Decoder::compute(const Products& products, int thread, Phase* phases, const Then& then) {
  const Linear& any = products.parts[0];
  const bool many = any.num_tokens >= kManyTokens, is_prepared = any.x_is_packed;
  char* own = static_cast<char*>(scratch_[thread].data);
  void* scratch = own + own_tokens_bytes();
  char* memory = many ? static_cast<char*>(prepared_.data) : own;
  const void* tokens[kNumForms] = {};
  const Linear* wanting[kNumForms];
  int64_t tiles[kNumForms], num_tiles = 0, num_forms = 0, shares[3], num_shares = 0;
  for (int64_t part = 0; part < products.count; part++) {
    const Linear& linear = products.parts[part];
    const Form form = form_of(linear.weight.kind);
    num_shares += shares[part] = (linear.out_features + products.share_rows[part] - 1) / products.share_rows[part];
    if (tokens[form]) continue;
    tokens[form] = is_prepared ? linear.x : memory + num_forms * prepared_bytes(linear.num_tokens, linear.in_features);
    wanting[num_forms] = &linear;
    num_tiles += tiles[num_forms++] = table_->linear[form].token_tiles(linear);
  }
  const auto prepare = [&](int64_t first, int64_t end) {
    each_part(tiles, num_forms, first, end, [&](int64_t index, int64_t first_tile, int64_t end_tile) {
      const Form form = form_of(wanting[index]->weight.kind);
      table_->linear[form].prepare(*wanting[index], const_cast<void*>(tokens[form]), scratch, first_tile, end_tile);
    });
  };
  bool prepared = is_prepared || many;
  if (many && !is_prepared) phases[0].run(num_tiles, num_threads_, prepare);
  const auto rows = [&](int64_t first, int64_t end) {
    if (!prepared) prepare(0, num_tiles);
    prepared = true;
    each_part(shares, products.count, first, end, [&](int64_t part, int64_t first_share, int64_t end_share) {
      const Linear& linear = products.parts[part];
      const int64_t first_row = first_share * products.share_rows[part];
      const int64_t end_row = smaller(end_share * products.share_rows[part], linear.out_features);
      const Form form = form_of(linear.weight.kind);
      table_->linear[form].rows(linear, tokens[form], scratch, first_row, end_row);
      then(part, first_row, end_row);
    });
  };
  // Of many tokens pieces are smaller, as a thread that is held up in a large one makes all others wait.
  const int64_t least = many ? larger(int64_t{1}, table_->least_rows / products.share_rows[0]) : 1;
  phases[1].run(num_shares, many ? 2 * num_threads_ : num_threads_, rows, least);
}

void Decoder::attention_block(int64_t index, int thread) {
  const ShuteyeLayer& own = layers_[index];
  const bool narrow = narrows(index);
  Phase* phases = &phases_[index * kPhasesPerLayer];
  query_key_value(index, thread, phases);
  if (narrow && step_->num_sampled == 0) return; // keys and values are written; nothing else is wanted
  Linear output = linear(own.output, attended_.data, narrow ? last_.data : hidden_.data);
  output.num_tokens = narrow ? step_->num_sampled : step_->num_tokens;
  output.rows = narrow ? step_->wanted : nullptr;
  output.residual = hidden_.data;
  output.x_is_packed = takes_packed(output);
  attention(index, thread, phases[2], output.x_is_packed);
  add(output, thread, phases + 3);
}

void Decoder::mlp_block(int64_t index, int thread) {
  const ShuteyeLayer& own = layers_[index];
  const bool narrow = narrows(index);
  if (narrow && step_->num_sampled == 0) return;
  Phase* phases = &phases_[index * kPhasesPerLayer] + 5;
  void* hidden = narrow ? last_.data : hidden_.data;
  Linear gate = linear(own.gate, hidden, activated_.data);
  gate.num_tokens = narrow ? step_->num_sampled : step_->num_tokens;
  gate.norm = own.post_norm;
  Linear down = linear(own.down, activated_.data, hidden);
  down.num_tokens = gate.num_tokens;
  down.residual = hidden;
  const bool together = form_of(own.gate.kind) == form_of(own.up.kind);
  down.x_is_packed = together && takes_packed(down);
  if (together) {
    gate.upper = own.up;
    gate.finish = Finish::silu_mul;
    gate.packs_out = down.x_is_packed;
    product(gate, thread, phases);
  } else {
    gate_and_up(own, gate, thread, phases);
  }
  add(down, thread, phases + 3);
}

// Of kinds that one kernel does not read together: one beside the other, then activated.
void Decoder::gate_and_up(const ShuteyeLayer& own, Linear gate, int thread, Phase* phases) {
  const int64_t inner = model_.intermediate;
  char* out = static_cast<char*>(gate_up_.data);
  Products products;
  gate.out = out;
  gate.out_stride = 2 * inner;
  products.add(gate, share_rows(own.gate.kind));
  Linear up = gate;
  up.weight = own.up;
  up.out = out + inner * itemsize_;
  products.add(up, share_rows(own.up.kind));
  compute(products, thread, phases, [](int64_t, int64_t, int64_t) {});
  phases[2].run(gate.num_tokens, num_threads_, [&](int64_t first, int64_t end) {
    table_->silu_mul_rows[model_.dtype](out + first * 2 * inner * itemsize_,
                                        static_cast<char*>(activated_.data) + first * inner * itemsize_, end - first, inner);
  });
}

void Decoder::query_key_value(int64_t index, int thread, Phase* phases) {
  const ShuteyeLayer& own = layers_[index];
  const int64_t head_dim = model_.cache.head_dim;
  const ShuteyeMatrix* matrices[] = {&own.query, &own.key, &own.value};
  Products products;
  int64_t first_head[3], row = 0;
  for (int64_t part = 0; part < 3; part++) {
    Linear heads = linear(*matrices[part], hidden_.data, static_cast<char*>(qkv_.data) + row * itemsize_);
    heads.out_stride = num_all_heads_ * head_dim;
    heads.norm = own.input_norm;
    products.add(heads, least_common_multiple(share_rows(heads.weight.kind), head_dim));
    first_head[part] = row / head_dim;
    row += heads.out_features;
  }
  const ShuteyeRope rope{model_.dtype,   step_->num_tokens, model_.num_heads, index,     model_.eps,   qkv_.data,
                         own.query_norm, own.key_norm,      step_->cos,       step_->sin, step_->slots, model_.cache};
  compute(products, thread, phases, [&](int64_t part, int64_t first_row, int64_t end_row) {
    table_->rope_heads[model_.dtype][model_.cache.dtype](rope, first_head[part] + first_row / head_dim, first_head[part] + end_row / head_dim);
  });
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
  if (!model_.head.data || step_->num_sampled == 0) return;
  Linear head = linear(model_.head, last_.data, step_->logits);
  head.num_tokens = step_->num_sampled;
  head.norm = model_.final_norm;
  head.finish = Finish::store_float;
  product(head, thread, phases);
}

} // namespace shuteye
