// A grid in flight: its threads are fibers; they meet in barriers. Blocks of a cluster run together, those of a cooperative
// grid all together, other clusters one after the other.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "scheduler.h"
#include "threads.h"

namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

class Grid;
inline thread_local Grid* grid = nullptr;
inline thread_local Fiber* running = nullptr;

class Grid {
 public:
  using Body = void (*)(const void* kernel);

  Grid(const LaunchShape& shape, Body body, const void* kernel, unsigned seed, uint64_t spin_limit, unsigned lost_message)
      : threads{shape.block, 1, 1}, blocks{shape.grid, 1, 1}, cluster_size(std::max(1u, shape.cluster)), shape_(shape),
        body_(body), kernel_(kernel), lost_message_(lost_message), scheduler_(seed, spin_limit) {}

  const Index threads, blocks;  // blockDim, gridDim
  const unsigned cluster_size;

  void run() {
    const unsigned clusters = shape_.grid / cluster_size;
    if (shape_.cooperative) return run_together(0, clusters);
    std::vector<unsigned> order(clusters);
    for (unsigned i = 0; i < clusters; ++i) order[i] = i;
    for (unsigned i = clusters; i > 1 && !scheduler_.in_order(); --i) {
      std::swap(order[i - 1], order[scheduler_.random.below(i)]);
    }
    for (unsigned cluster : order) run_together(cluster, 1);
  }

  // All lanes come, the last one calls `complete`, all go on. Returns which half of the warp's buffers is theirs.
  template <class Bring, class Complete>
  unsigned meet(At at, Site site, Bring bring, Complete complete) {
    Warp& warp = *running->warp;
    const unsigned half = warp.meetings & 1;
    if (!warp.waiting.empty() && warp.meets_at != at) {
      throw Fault(kDivergence, "divergence: lane " + std::to_string(running->lane) + " of " + warp_name(*running) +
                                   " came to " + name_of(at) + site.text() + " while " +
                                   std::to_string(warp.waiting.size()) + " lanes " + warp.waiting[0]->state());
    }
    bring(warp, half);
    warp.meets_at = at;
    scheduler_.progressed();
    if (warp.waiting.size() + 1 < warp.lanes) {
      wait(warp.waiting, at, site);
    } else {
      complete(warp, half);
      ++warp.meetings;
      release(warp.waiting);
    }
    return half;
  }

  void sync_threads(Site site) {
    Block& block = *running->block;
    converge(running->warp->threads, block.barriers, At::kSyncThreads, site);
    scheduler_.progressed();
    if (block.waiting.size() + 1 < shape_.block) return wait(block.waiting, At::kSyncThreads, site);
    ++block.barriers;
    release(block.waiting);
  }

  void cluster_arrive(Site site) {
    Cluster& cluster = *running->block->cluster;
    if (running->arrived) misuse("cluster_arrive a second time without cluster_wait", site);
    converge(running->warp->arrive, cluster.phase, At::kClusterArrive, site);
    running->arrived = true;
    running->phase = cluster.phase;
    arrive(cluster);
  }

  void cluster_wait(Site site) {
    Cluster& cluster = *running->block->cluster;
    if (!running->arrived) misuse("cluster_wait without cluster_arrive", site);
    converge(running->warp->wait, running->phase, At::kClusterWait, site);
    running->arrived = false;
    if (cluster.phase == running->phase) wait(cluster.waiting, At::kClusterWait, site);
  }

  // The address, in block `rank` of the cluster, of what `address` is in the running thread's.
  template <class T>
  T* mapped(T* address, unsigned rank, Site site) {
    const auto offset = reinterpret_cast<const unsigned char*>(address) - running->block->dynamic.data();
    return reinterpret_cast<T*>(peer(rank, address, site).dynamic.data() + offset);
  }

  void init_byte_barrier(uint64_t* barrier, Site site) { expect_right(own_inbox(barrier, site).init(barrier), site); }

  void expect_bytes(const uint64_t* barrier, unsigned bytes, Site site) {
    Inbox& inbox = own_inbox(barrier, site);
    expect_right(inbox.expect(barrier, bytes), site);
    scheduler_.published();
  }

  // Another look after all others have had their turn, as the hardware suspends a thread for a while.
  bool bytes_received(const uint64_t* barrier, unsigned parity, Site site) {
    Inbox& inbox = own_inbox(barrier, site);
    expect_right(inbox.problem(barrier), site);
    may_interrupt();
    if (inbox.completed(barrier, parity)) return true;
    look(At::kBytesReceived, site);
    scheduler_.spin(running);
    give_way(false);
    running->at = At::kRunning;
    return inbox.completed(barrier, parity);
  }

  void send(void* to, const void* value, uint64_t* barrier, unsigned rank, Site site) {
    if (cluster_size == 1) misuse("a message within a cluster of one block", site);
    may_interrupt();
    Block& block = peer(rank, to, site);
    Message message{mapped(static_cast<unsigned char*>(to), rank, site), mapped(barrier, rank, site), {}};
    if (!block.dynamic.holds(message.to, Message::kBytes) || reinterpret_cast<uintptr_t>(to) % Message::kBytes) {
      misuse("a message to an address that is no multiple of its size, or outside the shared memory", site);
    }
    std::memcpy(message.value, value, Message::kBytes);
    if (++sent_ == lost_message_) return;
    expect_right(block.inbox.post(message), site);
    ++under_way_;
    scheduler_.progressed();
    if (scheduler_.delivers_at_once()) land(block);
  }

  Block& peer(unsigned rank, const void* address, Site site) {
    const Block& own = *running->block;
    if (rank >= cluster_size) {
      misuse("map_shared to block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_size), site);
    }
    if (!own.dynamic.holds(address, 1)) misuse("map_shared of an address outside its dynamic shared memory", site);
    Block& block = *in_flight_[own.cluster->first + rank];
    if (block.exited == shape_.block) misuse("map_shared to " + block.name() + ", which has exited", site);
    return block;
  }

  void relax(Site site) {
    look(At::kRelax, site);
    scheduler_.spin(running);
    give_way(false);
    running->at = At::kRunning;
  }

  // In spin loops; counts loads, too, so that a loop without relax ends.
  void look(At at, Site site) {
    running->at = at;
    running->site = site;
    if (!scheduler_.look()) throw Fault(kLivelock, "livelock: nothing but spinning is left: " + whereabouts());
  }

  void published() { scheduler_.published(); }
  uint64_t now() { return scheduler_.now(); }

  // Where a GPU may let another warp go first, so may some schedules.
  void may_interrupt() {
    if (!scheduler_.interrupts()) return;
    land_one();
    scheduler_.ready(running);
    give_way(false);
  }

  [[noreturn]] void misuse(const std::string& what, Site site) const {
    throw Fault(kMisuse, "misuse: " + running->name() + ": " + what + site.text());
  }

 private:
  static std::string warp_name(const Fiber& fiber) {
    return "warp " + std::to_string(fiber.warp->number) + " of " + fiber.block->name();
  }

  void run_together(unsigned first_cluster, unsigned clusters) {
    build(first_cluster, clusters);
    failure_ = nullptr;
    running = scheduler_.next();
    switch_context(main_, running->context, false);
    running = nullptr;
    if (failure_) {
      for (const Fiber& fiber : fibers_) forget(fiber.context);
      std::rethrow_exception(failure_);
    }
    for (auto& block : in_flight_) {
      block->dynamic.reopen();
      if (cluster_size > 1 && !block->dynamic.untouched()) {
        throw Fault(kMisuse, "misuse: the shared memory of " + block->name() + " was written after it had exited: put " +
                                 "a cluster barrier after the last use of map_shared");
      }
    }
  }

  void build(unsigned first_cluster, unsigned clusters) {
    clusters_.assign(clusters, {});
    in_flight_.clear();
    fibers_ = std::vector<Fiber>(size_t{clusters} * cluster_size * shape_.block);
    for (unsigned c = 0; c < clusters; ++c) {
      Cluster& cluster = clusters_[c];
      cluster.first = c * cluster_size;
      cluster.threads = cluster.missing = cluster_size * shape_.block;
      for (unsigned rank = 0; rank < cluster_size; ++rank) {
        build_block((first_cluster + c) * cluster_size + rank, rank, cluster);
      }
    }
    live_ = fibers_.size();
    if (scheduler_.has_priorities()) draw_priorities();
    for (Fiber& fiber : fibers_) scheduler_.ready(&fiber);
  }

  void build_block(unsigned number, unsigned rank, Cluster& cluster) {
    const size_t first = in_flight_.size() * shape_.block;
    in_flight_.push_back(std::make_unique<Block>(number, shape_.shared));
    Block& block = *in_flight_.back();
    block.index.x = number;
    block.rank = rank;
    block.cluster = &cluster;
    block.threads = &fibers_[first];
    block.warps.resize((shape_.block + 31) / 32);
    for (unsigned i = 0; i < shape_.block; ++i) {
      Fiber& fiber = fibers_[first + i];
      fiber.index.x = i;
      fiber.lane = i % 32;
      fiber.block = &block;
      fiber.warp = &block.warps[i / 32];
      fiber.warp->number = i / 32;
      ++fiber.warp->lanes;
      prepare(fiber.context, first + i, enter);
    }
    // Lanes that a last, partial warp lacks.
    for (Warp& warp : block.warps) {
      std::memset(warp.shuffled, kNanByte, sizeof warp.shuffled);
      std::memset(warp.operands, kNanByte, sizeof warp.operands);
    }
  }

  void draw_priorities() {
    const size_t level = scheduler_.random.below(3);
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const Fiber& fiber = fibers_[i];
      const size_t block = i / shape_.block;
      if (level == 0 && in_flight_.size() > 1) {
        fibers_[i].group = block;
      } else if (level <= 1 && shape_.block > 32) {
        fibers_[i].group = block * fiber.block->warps.size() + fiber.warp->number;
      } else {
        fibers_[i].group = i;
      }
    }
    scheduler_.draw_priorities(fibers_.back().group + 1);
  }

  // A fiber's first function. Not instrumented: it is never left, so ASan would never see its frame end.
  __attribute__((no_sanitize("address"))) static void enter() {
    arrived_in(running->context);
    grid->run_thread();
    grid->give_way(true);
  }

  __attribute__((noinline)) void run_thread() {
    try {
      start();
      body_(kernel_);
      finish();
    } catch (const std::exception&) {
      failure_ = std::current_exception();
    } catch (...) {
      failure_ = std::make_exception_ptr(Fault(kException, "an exception that is no std::exception"));
    }
  }

  void start() {
    Block& block = *running->block;
    if (!block.started && cluster_size > 1 && !block.dynamic.untouched()) {
      throw Fault(kMisuse, "misuse: the shared memory of " + block.name() + " was written before it had started: put a " +
                               "cluster barrier before the first use of map_shared");
    }
    block.started = true;
  }

  void finish() {
    Block& block = *running->block;
    Cluster& cluster = *block.cluster;
    running->at = At::kExited;
    --live_;
    scheduler_.progressed();
    if (++block.exited == shape_.block) {
      if (const char* wrong = block.inbox.leftover()) throw Fault(kMisuse, "misuse: " + block.name() + " " + wrong);
      check_bounds(block);
    }
    --cluster.threads;
    // The hardware's cluster barrier does not wait for threads that have exited.
    const bool counted = running->arrived && running->phase == cluster.phase;
    if (!counted) arrive(cluster);
  }

  Inbox& own_inbox(const void* barrier, Site site) const {
    Block& block = *running->block;
    if (!block.dynamic.holds(barrier, sizeof(uint64_t)) || reinterpret_cast<uintptr_t>(barrier) % sizeof(uint64_t)) {
      misuse("an mbarrier outside the block's dynamic shared memory, or at no multiple of 8 bytes", site);
    }
    return block.inbox;
  }

  void expect_right(const char* wrong, Site site) const {
    if (wrong) misuse(wrong, site);
  }

  // One message to the block; whether a phase was over by it.
  bool land(Block& block) {
    bool completed = false;
    --under_way_;
    const size_t i = scheduler_.in_order() ? 0 : scheduler_.random.below(block.inbox.under_way());
    if (const char* wrong = block.inbox.land(i, completed)) {
      throw Fault(kMisuse, "misuse: a message to " + block.name() + ": " + wrong);
    }
    if (completed) {
      scheduler_.published();
    } else {
      scheduler_.progressed();
    }
    return completed;
  }

  // A block to which messages are under way, or null.
  Block* awaiting() {
    if (!under_way_) return nullptr;
    const size_t count = in_flight_.size(), first = scheduler_.in_order() ? 0 : scheduler_.random.below(count);
    for (size_t i = 0; i < count; ++i) {
      Block& block = *in_flight_[(first + i) % count];
      if (block.inbox.under_way()) return &block;
    }
    return nullptr;
  }

  void land_one() {
    if (Block* block = awaiting()) land(*block);
  }

  // Nobody can run: messages to one block land until it can go on.
  void land_late() {
    Block* const block = awaiting();
    while (block && block->inbox.under_way() && !land(*block)) {
    }
  }

  Fiber* next() {
    if (!scheduler_.has_ready()) land_late();
    return scheduler_.next();
  }

  void check_bounds(Block& block) {
    for (const Block::Array& array : block.arrays) {
      if (array.memory.overrun()) overrun(block, "an array", array.memory);
    }
    if (block.dynamic.overrun()) overrun(block, "the dynamic part", block.dynamic);
    if (cluster_size > 1) block.dynamic.close();
  }

  [[noreturn]] static void overrun(const Block& block, const std::string& part, const SharedMemory& memory) {
    throw Fault(kMisuse, "misuse: " + block.name() + " wrote outside " + part + " of its shared memory, " +
                             std::to_string(memory.bytes()) + " bytes");
  }

  void arrive(Cluster& cluster) {
    scheduler_.progressed();
    if (--cluster.missing > 0) return;
    ++cluster.phase;
    cluster.missing = cluster.threads;
    release(cluster.waiting);
  }

  void converge(Convergence& last, unsigned generation, At at, Site site) {
    if (last.generation == generation && !(last.site == site)) {
      throw Fault(kDivergence, "divergence: " + warp_name(*running) + " is in " + name_of(at) + last.site.text() +
                                   " and" + site.text() + " at once");
    }
    last = {generation, site};
  }

  void wait(std::vector<Fiber*>& waiting, At at, Site site) {
    running->at = at;
    running->site = site;
    waiting.push_back(running);
    give_way(false);
    running->at = At::kRunning;
  }

  void release(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting) scheduler_.ready(fiber);
    waiting.clear();
  }

  // Runs others until this fiber's turn comes again; with none left to run, or after a failure, the launch ends.
  void give_way(bool for_good) {
    Fiber* const from = running;
    Fiber* const to = failure_ ? nullptr : next();
    if (to == from) return;
    if (!to && !failure_ && live_ > 0) {
      failure_ = std::make_exception_ptr(Fault(kDeadlock, "deadlock: " + whereabouts()));
    }
    running = to;
    switch_context(from->context, to ? to->context : main_, for_good || !to);
  }

  // "blocks 0-3, warp 1: 16 of 32 threads wait in __syncthreads (file.cu:12), 16 have exited; block 4, ..."
  std::string whereabouts() const {
    const auto of_block = [this](size_t i) {
      const Block& block = *in_flight_[i];
      if (block.exited == shape_.block) return std::string();
      const auto of_warp = [&](size_t w) { return ": " + whereabouts(block.threads + w * 32, block.warps[w].lanes); };
      return ", " + grouped("warp", 0, block.warps.size(), ", ", of_warp);
    };
    return grouped("block", in_flight_[0]->number, in_flight_.size(), "; ", of_block);
  }

  // Neighbours of which the same is said share their place; of which nothing is said have none.
  template <class Say>
  static std::string grouped(const std::string& what, unsigned number, size_t count, const std::string& between, Say say) {
    std::string text;
    unsigned groups = 0;
    for (size_t first = 0, last; first < count; first = last + 1) {
      const std::string said = say(first);
      for (last = first; last + 1 < count && say(last + 1) == said;) ++last;
      if (said.empty()) continue;
      if (++groups > 4) return text + between + "and more";
      text += (text.empty() ? "" : between) + what + (first == last ? " " : "s ") + std::to_string(number + first);
      if (last > first) text += "-" + std::to_string(number + last);
      text += said;
    }
    return text;
  }

  static std::string whereabouts(const Fiber* of_warp, unsigned lanes) {
    std::vector<std::pair<std::string, unsigned>> counts;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const std::string where = of_warp[lane].state();
      auto found = std::find_if(counts.begin(), counts.end(), [&](const auto& count) { return count.first == where; });
      if (found == counts.end()) found = counts.insert(found, {where, 0});
      ++found->second;
    }
    std::string text;
    for (const auto& [where, count] : counts) {
      text += text.empty() ? std::to_string(count) + " of " + std::to_string(lanes) + " threads " + where
                           : ", " + std::to_string(count) + " " + where;
    }
    return text;
  }

  const LaunchShape shape_;
  const Body body_;
  const void* const kernel_;
  const unsigned lost_message_;
  Scheduler<Fiber> scheduler_;
  Context main_;
  std::exception_ptr failure_;
  std::vector<Cluster> clusters_;
  std::vector<std::unique_ptr<Block>> in_flight_;
  std::vector<Fiber> fibers_;
  size_t live_ = 0;
  size_t under_way_ = 0;  // messages
  unsigned sent_ = 0;
};

}  // namespace emulation
}  // namespace fastseq::cuda
