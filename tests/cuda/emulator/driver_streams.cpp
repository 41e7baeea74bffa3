// The stand-in's streams: lists of work that runs when somebody waits for it, and no earlier, so that what is used
// without waiting is not there yet.

#include <stdio.h>

#include "driver.h"

namespace driver {

List<Stream*> streams;
Stream legacy;
CUresult sticky;
size_t launches, graph_launches, copies;

namespace {

CUresult stop(CUresult error) { return sticky = error; }

CUresult run_copy(const Work& work) {
  copies++;
  auto* to = reinterpret_cast<uint8_t*>(work.to);
  memmove(to, work.staged ? work.staged : reinterpret_cast<void*>(work.from), work.bytes);
  return 0;
}

CUresult run_launch(const Launch& launch) {
  launches++;
  const Function& f = *launch.function;
  if (long(launches) == option("fail_launch", 0)) return stop(kLaunchFailed);
  List<emu_buffer> buffers;
  for (Memory& m : memories) buffers.add({m.base, m.bytes});
  List<void*> parameters;
  for (uint32_t i = 0; i < f.parameters; i++) parameters.add(&launch.values[i]);
  static char message[2048];
  int failed = f.module->launch(f.name, launch.grid, launch.block, launch.shared, parameters.items, buffers.items,
                                buffers.count, uint32_t(option("checks", 15)), message, sizeof message);
  buffers.release();
  parameters.release();
  if (!failed) return 0;
  fprintf(stderr, "emulated GPU: %s\n", message);
  return stop(strstr(message, " of buffer ") || strstr(message, "nobody's") ? kIllegalAddress : kLaunchFailed);
}

// In the last order that the edges allow: what lacks an edge then runs too early.
CUresult run_graph(Graph& graph) {
  graph_launches++;
  List<bool> ran;
  for (size_t i = 0; i < graph.nodes.count; i++) ran.add(false);
  CUresult result = 0;
  for (size_t left = graph.nodes.count; left && !result; left--) {
    size_t next = graph.nodes.count;
    for (size_t i = 0; i < graph.nodes.count; i++) {
      bool ready = !ran[i];
      for (size_t before : graph.nodes[i].after) ready &= ran[before];
      if (ready) next = i;
    }
    ran[next] = true;
    result = run_launch(graph.nodes[next].launch);
  }
  ran.release();
  return result;
}

CUresult run(Work& work) {
  if (work.kind == Kind::wait) return work.event.stream ? finish(work.event.stream, work.event.position) : 0;
  open_memory();
  CUresult result = work.kind == Kind::copy     ? run_copy(work)
                    : work.kind == Kind::launch ? run_launch(work.launch)
                                                : run_graph(*work.graph);
  close_memory();
  free(work.staged);
  if (work.kind == Kind::launch) free(work.launch.values);
  if (work.kind == Kind::graph) free_graph(work.graph);
  return result;
}

}  // namespace

Launch make_launch(Function* function, const unsigned* grid, const unsigned* block, unsigned shared, void** parameters) {
  Launch launch = {function, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, nullptr};
  launch.values = static_cast<uint64_t*>(calloc(function->parameters + 1, sizeof(uint64_t)));
  for (uint32_t i = 0; i < function->parameters; i++) memcpy(&launch.values[i], parameters[i], sizeof(uint64_t));
  return launch;
}

CUresult check_launch(const Launch& launch) {
  uint32_t free_shared = 48 * 1024 - launch.function->static_shared;
  uint32_t allowed = launch.function->dynamic_shared > free_shared ? launch.function->dynamic_shared : free_shared;
  for (int i = 0; i < 3; i++)
    if (!launch.grid[i] || !launch.block[i]) return kInvalidValue;
  return launch.shared > allowed || uint64_t(launch.block[0]) * launch.block[1] * launch.block[2] > 1024 ? kInvalidValue
                                                                                                         : 0;
}

Graph* copy_graph(Graph* graph) {
  auto* copy = static_cast<Graph*>(calloc(1, sizeof(Graph)));
  for (GraphNode& node : graph->nodes) {
    GraphNode& made = copy->nodes.add({node.launch, {}});
    uint32_t count = node.launch.function->parameters;
    made.launch.values = static_cast<uint64_t*>(calloc(count + 1, sizeof(uint64_t)));
    memcpy(made.launch.values, node.launch.values, count * sizeof(uint64_t));
    for (size_t before : node.after) made.after.add(before);
  }
  return copy;
}

void free_graph(Graph* graph) {
  for (GraphNode& node : graph->nodes) {
    free(node.launch.values);
    node.after.release();
  }
  for (Node* handle : graph->handles) free(handle);
  graph->nodes.release();
  graph->handles.release();
  free(graph);
}

Stream* stream_of(CUstream handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 1) return &legacy;  // CU_STREAM_LEGACY is 1
  for (Stream* stream : streams)
    if (stream == reinterpret_cast<Stream*>(handle)) return stream;
  return nullptr;
}

CUresult enqueue(Stream* stream, const Work& work) {
  stream->work.add(work);
  return 0;
}

CUresult finish(Stream* stream, size_t position) {
  while (!sticky && stream->done < stream->work.count && stream->done < position) {
    Work work = stream->work[stream->done++];
    run(work);
  }
  return sticky;
}

CUresult finish_all() {
  finish(&legacy);
  for (Stream* stream : streams) finish(stream);
  return sticky;
}

}  // namespace driver
