// The memory floor that the updates are measured against.
#pragma once

#include <cstdint>

namespace fast {

// `count` elements of `width` bytes; written back unchanged where `written` is set.
struct Stream {
  char* base;
  int64_t width;
  bool written;
};

// One piece of work: `count` elements of the streams [first, first + streams).
struct StreamChunk {
  int64_t first, streams, begin, count;
};

// Walks all streams of every chunk side by side, reads each once, and rewrites those that are
// written. Nothing that must read and write the same bytes can be faster. Returns a digest of what
// was read: it has to be used, or the compiler would not read.
uint64_t walk_streams(const Stream* streams, const StreamChunk* chunks, int64_t chunk_count,
                      int threads);

}  // namespace fast
