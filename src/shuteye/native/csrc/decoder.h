// A decoder step as one job of the pool, or among ranks as one job between each two of their sums. Knows no instruction
// set; weights are pointers, never copied.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "attention_tasks.h"
#include "group.h"
#include "pool.h"

namespace shuteye {

class Decoder {
 public:
  explicit Decoder(const ShuteyeModel& model);
  const char* run(ShuteyeStep& step); // null, or what is wrong with the step

 private:
  struct Buffer { // bytes, in huge pages where they fill one
    void* data = nullptr;
    int64_t size = 0;
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer();
    void reserve(int64_t nbytes); // what is in it is not kept
  };

  // Products of the same tokens with one or several matrices, whose rows lie one after the other.
  struct Products {
    Linear parts[3];
    int64_t share_rows[3]; // of each: shares of the work begin at multiples of it
    int64_t count = 0;

    void add(const Linear& linear, int64_t share) {
      parts[count] = linear;
      share_rows[count++] = share;
    }
  };

  const char* check(const ShuteyeStep& step) const;
  void embed(int64_t first, int64_t end);
  void work(int thread); // of every thread: all phases in order
  bool run_among_ranks();
  void work_between_sums(int thread); // likewise, one block of them
  ShuteyeReduce sum_after(int64_t block) const;
  bool narrows(int64_t index) const { return model_.head.data && index == model_.num_layers - 1; } // to the wanted tokens
  void begin();
  void attention_block(int64_t index, int thread);
  void mlp_block(int64_t index, int thread);
  void gate_and_up(const ShuteyeLayer& own, Linear gate, int thread, Phase* phases);
  void add(Linear linear, int thread, Phase* phases);
  void query_key_value(int64_t index, int thread, Phase* phases);
  void attention(int64_t index, int thread, Phase& phase, bool packs_out);
  void logits(int thread, Phase* phases);
  void product(const Linear& linear, int thread, Phase* phases);
  template <class Then>
  void compute(const Products& products, int thread, Phase* phases, const Then& then);
  void reserve_scratch();
  int64_t own_tokens_bytes() const;
  bool takes_packed(const Linear& linear) const;
  Linear linear(const ShuteyeMatrix& weight, const void* x, void* out) const;

  ShuteyeModel model_;
  std::vector<ShuteyeLayer> layers_;
  int64_t num_all_heads_;
  int64_t itemsize_;
  int64_t widest_; // of what products read
  Buffer hidden_;    // [max_tokens, hidden]
  Buffer last_;      // likewise, the wanted tokens of the last layer
  Buffer qkv_;       // [max_tokens, num_all_heads, head_dim]
  Buffer attended_;  // [max_tokens, num_heads, head_dim], or packed for the next product
  Buffer activated_; // [max_tokens, intermediate], likewise
  Buffer gate_up_;   // [max_tokens, 2, intermediate], where gate and up are computed one after the other
  Buffer prepared_;  // many tokens, in each form that a product wants
  Buffer part_;      // float [max_tokens, hidden], for parts that do not fit the group's slot
  Buffer scratch_[kMaxThreads];
  std::unique_ptr<Phase[]> phases_; // of the layers, of the head, of the embedding
  int64_t num_phases_;
  AttentionTasks tasks_;
  std::mutex one_step_;
  const ShuteyeStep* step_ = nullptr;       // while a step runs
  const KernelTable* table_ = nullptr;      // likewise
  int num_threads_ = 1;                     // likewise
  Group* group_ = nullptr;                  // likewise, among ranks; so are those below
  int64_t block_ = 0;                       // attention of layer 0, its MLP, attention of layer 1, ..., head
  ShuteyeReduce before_{};                  // the sum that this block begins with
  ShuteyeReduce sum_{};                     // the one that it ends in; without a part: it lies in the slot
  void* own_part_ = nullptr;                // of it
  Phase sum_phase_;
};

} // namespace shuteye
