// The forward op and the input gradient by rows.
//
// Under a stride the forward op adds what phases of its source give, and the input gradient has phases
// of its result (row_axis.h): so both are sums where tap k reads t + offset + dilation * k to write t.
// A task packs what a part of a plane reads, with zeros around it, and computes the part from that: so
// no tap looks where it is, half types are widened once, and what is behind a row never counts.

#include "row_schedule.h"

#include "row_plan.h"

namespace jax_dwbp {
namespace {

// A part of a plane: rows and columns of each phase.
struct Part {
  int64_t row, rows, column, columns;
};

// What is done for a part of each slice of a task. It is listed once, as it is the same for each of
// them but for where the slice lies, and which taps of the depth meet it: of small slices it would take
// longer to list than to do.
class Steps {
 public:
  // Lines that the lists of a part take.
  static int64_t ListLines(const RowPlan& plan) {
    return ListIn<Copy>::Lines(Copies(plan.call)) + ListIn<Sum>::Lines(plan.Sums(plan.band));
  }

  Steps(const RowPlan& plan, const Part& part, Line* memory, Line* lists)
      : plan_(plan),
        call_(plan.call),
        part_(part),
        phases_(memory),
        in_(phases_ + plan.phase_lines),
        copies_(lists),
        sums_(lists + ListIn<Copy>::Lines(Copies(plan.call))) {
    for (int64_t k = 0; k < call_.depth.kernel; ++k) {
      for (int64_t source = 0; source < call_.Sources(); ++source) ListCopies(k, source);
    }
    for (int64_t phase = 0; phase < call_.rows.OutPhases(); ++phase) ListRowPhase(phase);
    ListPieces();
  }

  // What comes next is that slice of a plane.
  void BeginSlice(int64_t slice) {
    bool is_other = false;
    for (int64_t k = 0; k < call_.depth.kernel; ++k) {
      const int64_t read = call_.depth.Read(k, slice);
      is_other |= (read < 0) != (std::exchange(slices_[k], read) < 0);
    }
    if (is_other) ListPieces();
  }

  // For the plane whose input and the slice of whose result start there. What is read next lies `ahead`
  // bytes further.
  void Run(const char* in, const Line* weights, char* out, int64_t ahead) {
    const int64_t slice_bytes = call_.in.slice * call_.kernels.element_size;
    for (Copy& copy : copies_) {
      const int64_t slice = slices_[copy.k];
      if (slice < 0) continue;
      copy.rows.from = in + slice * slice_bytes + copy.from;
      copy.rows.ahead = ahead;
      call_.kernels.row_moves->copy(copy.rows);
      // The zeros around it are there now.
      copy.rows.before = copy.rows.after = 0;
    }
    Sum* sum = sums_.begin();
    for (RowPhase& phase : row_phases_) {
      for (; sum < sums_.begin() + phase.sums_end; ++sum) {
        sum->rows.weights = weights + sum->weight;
        if (!HasPhases()) sum->rows.out = out + sum->out;
        plan_.kernels.convolve(sum->rows);
      }
      if (!HasPhases()) continue;
      phase.rows.to = out + phase.out;
      call_.kernels.row_moves->interleave(phase.rows);
    }
  }

 private:
  // Of what a tap of the depth reads: bytes from the first element of the slice.
  struct Copy {
    RowCopy rows;
    int64_t from;
    int64_t k;
  };
  struct Piece {
    RowPiece rows;
    int64_t k;
  };
  struct Sum {
    RowConvolution rows;
    int64_t weight;  // lines from the first of the filter
    int64_t out;
  };
  struct RowPhase {
    RowInterleave rows;
    int64_t out;
    int64_t sums_end, pieces_end;
  };

  static int64_t Copies(const RowCall& call) {
    return call.AllSources() * call.rows.regions.Size() * call.columns.regions.Size();
  }

  // Whether columns of the result are computed phase by phase, and stored when all of them are there.
  bool HasPhases() const { return call_.columns.write_step > 1; }

  void ListCopies(int64_t k, int64_t source) {
    const RowAxis &rows = call_.rows, &columns = call_.columns;
    const int64_t row_bytes = plan_.in_step * sizeof(Line) / plan_.lanes;
    Line* const to = in_ + (k * call_.Sources() + source) * plan_.source_lines;
    for (int64_t i = 0; i < rows.regions.Size(); ++i) {
      const RowRegion& region = rows.regions[i];
      const int64_t first = part_.row + region.first, count = part_.rows + region.extra;
      const int64_t begin = std::clamp<int64_t>(-first, 0, count);
      const int64_t end = std::clamp(rows.InSize(region.phase) - first, begin, count);
      const int64_t start = rows.Start(i, plan_.band);
      char* const bytes = reinterpret_cast<char*>(to) + start * row_bytes;
      std::memset(bytes, 0, begin * row_bytes);
      std::memset(bytes + end * row_bytes, 0, (count - end) * row_bytes);
      for (int64_t j = 0; j < columns.regions.Size() && begin < end; ++j) {
        const RowRegion& side = columns.regions[j];
        const RowWindow window{.row = (first + begin) * rows.read_step + region.phase,
                               .row_step = rows.read_step,
                               .rows = end - begin,
                               .phase = side.phase,
                               .column_step = columns.read_step,
                               .column = part_.column + side.first,
                               .columns = part_.columns + side.extra,
                               .size = columns.InSize(side.phase)};
        const int64_t values = columns.Start(j, plan_.tile) * plan_.pixels.period;
        copies_.Add(
            {CopyOf(window, plan_.pixels, call_.in.row, to, (start + begin) * plan_.in_step + values,
                    plan_.in_step),
             (window.First(call_.in) + source * call_.SourceStep()) * call_.kernels.element_size, k});
      }
    }
  }

  void ListRowPhase(int64_t row_phase) {
    const RowAxis &rows = call_.rows, &columns = call_.columns;
    const int64_t element = call_.kernels.element_size;
    const int64_t first_row = part_.row * rows.write_step + row_phase;
    const int64_t first_column = part_.column * columns.write_step;
    const int64_t out = (first_row * call_.out.row + first_column * call_.out.column) * element;
    const int64_t count = std::min(part_.rows, rows.OutSize(row_phase) - part_.row);
    const RowPiece* const pieces = pieces_ + piece_count_;
    const RowAxis::Range taps = rows.Meeting(row_phase);
    const int64_t sources = call_.Sources(), slices = call_.depth.kernel;
    for (int64_t i = taps.begin; i < taps.end; ++i) {
      for (int64_t j = 0; j < slices * sources; ++j) {
        const int64_t k = j / sources, source = j % sources;
        const RowPiece piece{
            rows.Read(i, plan_.band) * plan_.in_step + j * plan_.source_lines * plan_.lanes,
            (rows.Before(i) + (source * slices + k) * rows.kernel) * columns.kernel,
            rows.taps[i].count};
        listed_[piece_count_++] = {piece, k};
      }
    }
    RowPhase phase{};
    phase.out = out;
    if (!HasPhases()) {
      ListSums(pieces, 0, count, nullptr, out, rows.write_step * call_.out.row);
    } else {
      const int64_t phases = columns.OutPhases(), row_values = phases * plan_.phase_step;
      char* const bytes = reinterpret_cast<char*>(phases_);
      for (int64_t i = 0; i < phases; ++i) {
        ListSums(pieces, i, count, bytes + i * plan_.phase_step * element, 0, row_values);
      }
      const int64_t pixels = std::min(part_.columns * columns.write_step, columns.out - first_column);
      phase.rows = {.from = bytes,
                    .from_step = plan_.phase_step,
                    .from_row_step = row_values,
                    .rows = count,
                    .phases = phases,
                    .period = plan_.period,
                    .count = pixels * plan_.period,
                    .to = nullptr,
                    .to_step = rows.write_step * call_.out.row};
    }
    phase.sums_end = sums_.Size(), phase.pieces_end = piece_count_;
    row_phases_.Add(phase);
  }

  // The pieces of the slices that are read. What no tap meets is a sum of nothing.
  void ListPieces() {
    int64_t i = 0;
    Sum* sum = sums_.begin();
    for (const RowPhase& phase : row_phases_) {
      RowPiece *const first = pieces_ + i, *end = first;
      for (; i < phase.pieces_end; ++i) {
        if (slices_[listed_[i].k] >= 0) *end++ = listed_[i].rows;
      }
      for (; sum < sums_.begin() + phase.sums_end; ++sum) {
        sum->rows.piece_count = sum->rows.column_count > 0 ? end - first : 0;
      }
    }
  }

  // One phase of rows and of columns.
  void ListSums(const RowPiece* pieces, int64_t column_phase, int64_t count, char* to, int64_t out,
                int64_t out_step) {
    const RowAxis &rows = call_.rows, &columns = call_.columns;
    const RowAxis::Range taps = columns.Meeting(column_phase);
    const int64_t first = columns.Before(taps.begin), column_count = columns.Before(taps.end) - first;
    const int64_t width = part_.columns * plan_.period, element = call_.kernels.element_size;
    // Rows of the result that a dilated filter takes to the same rows.
    for (int64_t row = 0; row < std::min(rows.dilation, count); ++row) {
      for (int64_t variant = 0; variant * plan_.lanes < std::min(plan_.line_step, width); ++variant) {
        const int64_t value = variant * plan_.lanes;
        const int64_t skipped = (row * out_step + value) * element;
        const RowConvolution conv{.in = in_,
                                  .first = row * plan_.in_step + value / plan_.repeats,
                                  .in_step = rows.dilation * plan_.in_step,
                                  .repeats = plan_.repeats,
                                  .read_before = value % plan_.repeats,
                                  .pieces = pieces,
                                  .piece_count = 0,
                                  .columns = plan_.reads.data() + first,
                                  .column_count = column_count,
                                  .weights = nullptr,
                                  .weight_step = columns.kernel,
                                  .rows = CeilDiv(count - row, rows.dilation),
                                  .width = width - value,
                                  .line_step = plan_.line_step,
                                  .out = to ? to + skipped : nullptr,
                                  .out_step = rows.dilation * out_step,
                                  .by_row = plan_.by_row};
        sums_.Add({conv, variant * plan_.variant_lines + first, out + skipped});
      }
    }
  }

  const RowPlan& plan_;
  const RowCall& call_;
  const Part part_;
  Line *const phases_, *const in_;
  ListIn<Copy> copies_;
  ListIn<Sum> sums_;
  int64_t slices_[kMostPieces]{};  // that the taps of the depth read, or -1
  Piece listed_[kMostPieces];      // of all of them
  RowPiece pieces_[kMostPieces];
  int64_t piece_count_ = 0;
  Few<RowPhase> row_phases_;
};

void PackFilter(const RowPlan& plan, const std::vector<int64_t>& taps, int64_t filter, Line* to) {
  const RowCall& call = plan.call;
  const int64_t planes = call.Planes(), tap_count = taps.size();
  const int64_t first = filter / planes * call.filter.problem + call.FilterPlane(filter % planes);
  for (int64_t variant = 0; variant < plan.variants; ++variant) {
    for (int64_t i = 0; i < call.Sources(); ++i) {
      call.kernels.row_moves->weights({call.filter.data + (first + i) * call.kernels.element_size,
                                       taps.data(), tap_count, call.TapStep(), plan.period,
                                       variant * plan.lanes % plan.period, call.ValueStep(),
                                       to + variant * plan.variant_lines + i * tap_count});
    }
  }
}

// A slice of a plane of the result, in the order in which they are computed: that of memory, but that
// all images come before the next few filters, which are packed once for them.
struct Place {
  const RowPlan& plan;
  const int64_t channels;
  int64_t problem, image, block, slot, slice;

  Place(const RowPlan& plan, int64_t index)
      : plan(plan), channels(plan.call.Planes()), slice(index % plan.call.depth.out) {
    index /= plan.call.depth.out;
    const int64_t of_problem = plan.call.sizes.batch * channels;
    const int64_t of_block = plan.call.sizes.batch * plan.filters;
    problem = index / of_problem;
    block = index % of_problem / of_block;
    image = index % of_problem % of_block / Slots();
    slot = index % of_problem % of_block % Slots();
  }

  int64_t Slots() const { return std::min(plan.filters, channels - block * plan.filters); }
  int64_t Channel() const { return block * plan.filters + slot; }
  int64_t Filter() const { return problem * channels + Channel(); }
  int64_t Image() const { return problem * plan.call.sizes.batch + image; }
  int64_t In() const { return Image() * plan.call.in.image + plan.call.InPlane(Channel()); }
  int64_t Out() const {
    return Image() * plan.call.out.image + plan.call.OutPlane(Channel()) + slice * plan.call.out.slice;
  }
  // Where it reads, from where others read, but for the padding.
  int64_t Reads() const { return In() + slice * plan.call.depth.Between() * plan.call.in.slice; }

  void Next() {
    if (++slice < plan.call.depth.out) return;
    slice = 0;
    if (++slot < Slots()) return;
    slot = 0;
    if (++image < plan.call.sizes.batch) return;
    image = 0;
    if (++block * plan.filters < channels) return;
    block = 0, ++problem;
  }
};

}  // namespace

std::vector<int64_t> RowCall::Order() const {
  std::vector<int64_t> taps;
  taps.reserve(Taps());
  const std::vector<int64_t> rows_in_order = rows.Order(), columns_in_order = columns.Order();
  for (int64_t end = sizes.SliceTaps(); end <= Taps(); end += sizes.SliceTaps()) {
    const int64_t first = end - sizes.SliceTaps();
    for (int64_t row : rows_in_order) {
      for (int64_t column : columns_in_order) {
        const int64_t tap = row * columns.kernel + column;
        taps.push_back(is_transposed ? end - 1 - tap : first + tap);
      }
    }
  }
  return taps;
}

int64_t RowWindow::Begin() const { return std::clamp<int64_t>(-column, 0, columns); }

int64_t RowWindow::First(const Tensor& tensor) const {
  const int64_t in_phase = std::clamp<int64_t>(column + Begin(), 0, size);
  return row * tensor.row + (phase + in_phase * column_step) * tensor.column;
}

RowCopy CopyOf(const RowWindow& window, RowPixels pixels, int64_t row_step, Line* to, int64_t first,
               int64_t to_step) {
  const int64_t begin = window.Begin(), period = pixels.period;
  const int64_t end = std::clamp(window.size - window.column, begin, window.columns);
  pixels.column_step *= window.column_step;
  return {.from = nullptr,
          .from_step = window.row_step * row_step,
          .rows = window.rows,
          .pixels = pixels,
          .count = (end - begin) * period,
          .to = to,
          .first = first + begin * period,
          .to_step = to_step,
          .before = begin * period,
          .after = (window.columns - end) * period,
          .ahead = 0};
}

void ConvolveRows(ffi::ThreadPool& pool, const RowCall& call) {
  const RowPlan plan(call, pool.num_threads());
  const std::vector<int64_t> taps = call.Order();
  const int64_t element = call.kernels.element_size;
  PreferHugePages(call.out.data, call.sizes.problems * call.out.problem * element);
  const int64_t lines = plan.lines + Steps::ListLines(plan);
  ParallelFor(pool, plan.threads, plan.groups * plan.bands * plan.tiles, lines,
              [&](Scratch& scratch, int64_t task) {
                const int64_t tile = task % plan.tiles, band = task / plan.tiles % plan.bands;
                const int64_t group = task / plan.tiles / plan.bands;
                const int64_t row = band * plan.band, column = tile * plan.tile;
                Line* const filters = scratch.Lines(lines);
                if (scratch.held.empty()) scratch.held.assign(plan.filters, -1);
                Steps steps(plan,
                            {row, std::min(plan.band, call.rows.OutSize(0) - row), column,
                             std::min(plan.tile, call.columns.OutSize(0) - column)},
                            filters + plan.filters * plan.weight_lines, filters + plan.lines);
                const int64_t first = group * plan.group,
                              end = std::min(first + plan.group, plan.slices);
                Place place(plan, first);
                for (int64_t i = first; i < end; ++i) {
                  Line* const weights = filters + place.slot * plan.weight_lines;
                  if (std::exchange(scratch.held[place.slot], place.Filter()) != place.Filter()) {
                    PackFilter(plan, taps, place.Filter(), weights);
                  }
                  steps.BeginSlice(place.slice);
                  const int64_t in = place.In(), out = place.Out(), reads = place.Reads();
                  place.Next();
                  // No processor foresees what lies on another page.
                  const int64_t ahead = i + 1 < end ? place.Reads() - reads : 0;
                  steps.Run(call.in.data + in * element, weights, call.out.data + out * element,
                            ahead * element);
                }
              });
}

}  // namespace jax_dwbp
