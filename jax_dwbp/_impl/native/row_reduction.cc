// The filter gradient by rows. A filter's sum is taken of units, parts of a slice of dy that stay in
// the cache. Of each slice of the input that taps of the depth meet there the same part is read.

#include "row_lanes.h"
#include "row_schedule.h"

namespace jax_dwbp {
namespace {

// The result may not depend on the number of threads: this many parts of it, at least, are summed by
// themselves, of which the sums take at most so many bytes.
constexpr int64_t kParts = 32;
constexpr int64_t kPartBytes = 4 << 20;
// Of so many lines the sums join those of others.
constexpr int64_t kFoldLines = 2048;
// Bytes of the sums of filters that are summed at a time, so that planes are read in the order of
// memory.
constexpr int64_t kSumBytes = 16 << 10;

// Where a unit of a filter lies: a plane of the input and, of that of dy, a slice.
struct Unit {
  const char *x, *dy;
  int64_t slice;
};

// How the work is cut. All but the threads is fixed by the shapes.
struct SumPlan {
  const RowCall& call;
  int64_t period, lanes, line_step, variants;
  int64_t taps, filters;
  int64_t column, columns;  // of dy that meet more than padding
  int64_t tile, tiles;      // columns
  int64_t band, bands;      // rows
  int64_t in_step, dy_step;
  int64_t units, parts;    // of a filter
  int64_t threads, group;  // filters of a task
  int64_t slots;           // filters that are summed at a time
  bool reads_dy;           // in place, where that may be
  int64_t in_lines, dy_lines, fold_lines, lines;

  SumPlan(const RowCall& call, int64_t pool_threads)
      : call(call),
        period(call.Period()),
        lanes(call.kernels.lanes),
        line_step(call.LineStep()),
        variants(call.Variants()),
        taps(call.Taps()),
        filters(call.sizes.problems * call.Planes()) {
    const RowAxis &rows = call.rows, &across = call.columns;
    const int64_t element = sizeof(Line) / lanes;
    int64_t end = 0;
    column = across.out;
    for (const RowRegion& region : across.regions) {
      column = std::min(column, std::max<int64_t>(0, -region.first - region.extra));
      end = std::max(end, std::min(across.out, across.InSize(region.phase) - region.first));
    }
    columns = std::max<int64_t>(0, end - column);
    tile = std::clamp<int64_t>(columns, 1, across.Fitting(kRowBytes / element / period));
    tiles = CeilDiv(columns, tile);
    in_step = (CeilDiv(across.Packed(tile) * period, lanes) | 1) * lanes;
    dy_step = (CeilDiv(tile * period, lanes) | 1) * lanes;
    const int64_t row_step = rows.regions.Size() * in_step + dy_step;
    const int64_t fitting = (kBandBytes / element - rows.extra * in_step) / row_step;
    bands = CeilDiv(rows.out, std::max(fitting, rows.Least()));
    band = CeilDiv(rows.out, bands);
    units = call.sizes.batch * call.depth.out * bands * tiles;
    fold_lines = CeilDiv(taps * period, lanes);
    const int64_t most = kPartBytes / static_cast<int64_t>(sizeof(Line)) / (filters * fold_lines);
    parts = std::max<int64_t>(1, std::min({CeilDiv(kParts, filters), most, units}));
    const int64_t work = filters * units * band * CeilDiv(tile * period, lanes) * taps;
    threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
    group = parts > 1 ? 1 : CeilDiv(filters, kTasks * threads);
    // With what the last line reads behind its row.
    in_lines = rows.Packed(band) * in_step / lanes + 1;
    dy_lines = band * dy_step / lanes + 1;
    const int64_t most_slots = kSumBytes / static_cast<int64_t>(sizeof(Line)) / SumLines();
    slots = std::clamp<int64_t>(most_slots, 1, group);
    lines = in_lines + dy_lines + slots * (SumLines() + fold_lines);
    reads_dy = call.kernels.element_size == element;
  }

  // Of a filter: a line for each tap of whole lines of a row, and one of what is left.
  int64_t SumLines() const { return 2 * variants * taps; }

  Unit At(int64_t filter, int64_t index) const {
    const int64_t element = call.kernels.element_size, plane = filter % call.Planes();
    const int64_t place = index / tiles / bands, slice = place % call.depth.out;
    const int64_t image = filter / call.Planes() * call.sizes.batch + place / call.depth.out;
    const int64_t dy = image * call.out.image + call.OutPlane(plane) + slice * call.out.slice;
    return {.x = call.in.data + (image * call.in.image + call.InPlane(plane)) * element,
            .dy = call.out.data + dy * element,
            .slice = slice};
  }
  // Whether that is read in place: behind each row of it there has to be a line, be it of no account.
  bool ReadsDy(const char* slice) const {
    const int64_t rest = call.sizes.problems * call.out.problem - call.out.row * call.rows.out - lanes;
    return reads_dy && slice - call.out.data <= rest * call.kernels.element_size;
  }
};

// What a task sums. What is done for a unit is listed once for all that lie alike in their image: of
// small planes it would take longer to list than to do.
class Sums {
 public:
  // Lines that the lists of a unit take.
  static int64_t ListLines(const SumPlan& plan) {
    return ListIn<Copy>::Lines(Regions(plan.call)) +
           ListIn<Correlation>::Lines(2 * plan.variants * Regions(plan.call));
  }

  Sums(const SumPlan& plan, Line* memory)
      : plan_(plan),
        in_(memory),
        dy_(in_ + plan.in_lines),
        lines_(dy_ + plan.dy_lines),
        copies_(memory + plan.lines),
        correlations_(memory + plan.lines + ListIn<Copy>::Lines(Regions(plan.call))) {}

  // What comes next is added to the totals of so many filters.
  void Begin(Line* totals, int64_t slots) {
    totals_ = totals, slots_ = slots;
    std::memset(totals, 0, slots * plan_.fold_lines * sizeof(Line));
    Clear();
  }

  // What comes next is in some rows and columns of an image.
  void BeginUnit(int64_t band, int64_t tile) {
    if (band != band_ || tile != tile_) List(band, tile);
    if (summed_ + lines_of_unit_ > kFoldLines) Fold();
    summed_ += lines_of_unit_;
  }

  // Adds it for one of the filters. Then comes `next`.
  void Add(int64_t slot, const Unit& unit, const Unit& next) {
    const RowCall& call = plan_.call;
    const int64_t slice_bytes = call.in.slice * call.kernels.element_size;
    const int64_t slices_ahead = (next.slice - unit.slice) * call.depth.Between();
    const int64_t x_ahead = next.x - unit.x + slices_ahead * slice_bytes;
    const bool reads_dy = plan_.ReadsDy(unit.dy);
    if (!reads_dy) CopyRows(dy_copy_, unit.dy, next.dy - unit.dy);
    for (Correlation& corr : correlations_) {
      corr.rows.dy = reads_dy ? unit.dy + dy_copy_.from : reinterpret_cast<const char*>(dy_);
      corr.rows.dy_step = reads_dy ? call.out.row : plan_.dy_step;
    }
    Line* sums = lines_ + slot * plan_.SumLines();
    for (int64_t k = 0; k < call.depth.kernel; ++k, sums += call.sizes.SliceTaps()) {
      const int64_t slice = call.depth.Read(k, unit.slice);
      if (slice < 0) continue;
      for (Copy& copy : copies_) CopyRows(copy, unit.x + slice * slice_bytes, x_ahead);
      for (Correlation& corr : correlations_) {
        corr.rows.sums = sums + corr.sums;
        call.kernels.row_sums->correlate(corr.rows);
      }
    }
  }

  // Adds to the totals what is in lines.
  void Fold() {
    for (int64_t slot = 0; slot < slots_ && summed_ > 0; ++slot) {
      const Line* lines = lines_ + slot * plan_.SumLines();
      for (int64_t variant = 0; variant < plan_.variants; ++variant) {
        const int64_t counts[] = {WholeLines(variant) > 0 ? LineValues() : 0, Rest(variant)};
        for (int i = 0; i < 2; ++i, lines += plan_.taps) {
          if (counts[i] == 0) continue;
          plan_.call.kernels.row_sums->fold({lines, plan_.taps, plan_.period,
                                             variant * plan_.lanes % plan_.period, counts[i],
                                             totals_ + slot * plan_.fold_lines});
        }
      }
    }
    Clear();
  }

 private:
  struct Copy {
    RowCopy rows;
    int64_t from;  // bytes from the slice's first element
  };
  struct Correlation {
    RowCorrelation rows;
    int64_t sums;  // lines from the first of the filter
  };

  static int64_t Regions(const RowCall& call) {
    return call.rows.regions.Size() * call.columns.regions.Size();
  }

  void CopyRows(Copy& copy, const char* slice, int64_t ahead) {
    copy.rows.from = slice + copy.from;
    copy.rows.ahead = ahead;
    plan_.call.kernels.row_moves->copy(copy.rows);
    // The zeros around it are there now.
    copy.rows.before = copy.rows.after = 0;
  }
  void Clear() {
    std::memset(lines_, 0, slots_ * plan_.SumLines() * sizeof(Line));
    summed_ = 0;
  }
  // Values of a line that count, whole lines of a row, and what the last one has.
  int64_t LineValues() const { return std::min(plan_.line_step, plan_.lanes); }
  int64_t WholeLines(int64_t variant) const {
    const int64_t room = values_ - variant * plan_.lanes - LineValues();
    return room < 0 ? 0 : room / plan_.line_step + 1;
  }
  int64_t Rest(int64_t variant) const {
    const int64_t end = variant * plan_.lanes + WholeLines(variant) * plan_.line_step;
    return std::clamp<int64_t>(values_ - end, 0, plan_.lanes);
  }

  void List(int64_t band, int64_t tile) {
    band_ = band, tile_ = tile;
    const RowCall& call = plan_.call;
    const int64_t row = band * plan_.band, rows = std::min(plan_.band, call.rows.out - row);
    const int64_t column = plan_.column + tile * plan_.tile;
    const int64_t columns = std::min(plan_.tile, plan_.column + plan_.columns - column);
    if (columns * plan_.period != values_) Fold();
    values_ = columns * plan_.period;
    lines_of_unit_ = rows * (CeilDiv(values_, plan_.line_step) + 1);
    copies_.Clear();
    correlations_.Clear();
    const RowWindow window{.row = row,
                           .row_step = 1,
                           .rows = rows,
                           .phase = 0,
                           .column_step = 1,
                           .column = column,
                           .columns = columns,
                           .size = call.columns.out};
    const RowPixels dy_pixels{plan_.period, 1, 1, call.out.column};
    dy_copy_ = {CopyOf(window, dy_pixels, call.out.row, dy_, 0, plan_.dy_step), From(window, call.out)};
    for (int64_t i = 0; i < call.rows.regions.Size(); ++i) {
      const RowRegion& region = call.rows.regions[i];
      const int64_t in_row = std::max<int64_t>(0, row + region.first);
      const int64_t in_end =
          std::min(call.rows.InSize(region.phase), row + rows + region.first + region.extra);
      if (in_row >= in_end) continue;
      const int64_t start = call.rows.Start(i, plan_.band) * plan_.in_step;
      for (int64_t j = 0; j < call.columns.regions.Size(); ++j) {
        const RowRegion& side = call.columns.regions[j];
        const int64_t first = start + call.columns.Start(j, plan_.tile) * plan_.period;
        const RowWindow read{.row = in_row * call.rows.read_step + region.phase,
                             .row_step = call.rows.read_step,
                             .rows = in_end - in_row,
                             .phase = side.phase,
                             .column_step = call.columns.read_step,
                             .column = column + side.first,
                             .columns = columns + side.extra,
                             .size = call.columns.InSize(side.phase)};
        const RowPixels pixels = call.InPixels(call.Repeats());
        copies_.Add(
            {CopyOf(read, pixels, call.in.row, in_, first, plan_.in_step), From(read, call.in)});
        const int64_t line = call.rows.Before(i) * call.columns.kernel + call.columns.Before(j);
        for (int64_t variant = 0; variant < plan_.variants; ++variant) {
          const int64_t begin = variant * plan_.lanes, whole = WholeLines(variant);
          const int64_t firsts[] = {begin, begin + whole * plan_.line_step};
          const int64_t counts[] = {whole, Rest(variant) > 0};
          for (int k = 0; k < 2; ++k) {
            if (counts[k] == 0) continue;
            const RowCorrelation corr{.in = in_,
                                      .first = first + firsts[k],
                                      .in_step = plan_.in_step,
                                      .in_rows = in_end - in_row,
                                      .dy = nullptr,
                                      .dy_first = firsts[k],
                                      .dy_step = 0,
                                      .dy_rows = rows,
                                      .offset = row + region.first - in_row,
                                      .row_dilation = call.rows.dilation,
                                      .kernel_rows = call.rows.taps[i].count,
                                      .kernel_columns = call.columns.taps[j].count,
                                      .tap_step = call.columns.dilation * plan_.period,
                                      .lines = counts[k],
                                      .line_step = plan_.line_step,
                                      .sums = nullptr,
                                      .sum_step = call.columns.kernel};
            correlations_.Add({corr, (2 * variant + k) * plan_.taps + line});
          }
        }
      }
    }
  }

  int64_t From(const RowWindow& window, const Tensor& tensor) const {
    return window.First(tensor) * plan_.call.kernels.element_size;
  }

  const SumPlan& plan_;
  Line *const in_, *const dy_;
  // Of each filter, those of whole lines before those of the one at the end of a row.
  Line* const lines_;
  Line* totals_ = nullptr;
  int64_t slots_ = 0;
  int64_t band_ = -1, tile_ = -1;  // what is listed
  int64_t values_ = 0;             // of a row
  int64_t lines_of_unit_ = 0, summed_ = 0;
  Copy dy_copy_{};
  ListIn<Copy> copies_;  // of what a tap of the depth reads
  ListIn<Correlation> correlations_;
};

}  // namespace

int64_t CorrelationLines(const RowCall& call) {
  const SumPlan plan(call, 1);
  return plan.lines + Sums::ListLines(plan);
}

void CorrelateRows(ffi::ThreadPool& pool, const RowCall& call) {
  const SumPlan plan(call, pool.num_threads());
  const RowSums& kernels = *call.kernels.row_sums;
  const int64_t element = call.kernels.element_size, channels = call.Planes();
  const int64_t groups = CeilDiv(plan.filters, plan.group);
  const bool has_parts = plan.parts > 1;
  const std::vector<int64_t> taps = call.Order();
  const std::unique_ptr<Line[]> memory(has_parts ? new Line[plan.filters * plan.parts * plan.fold_lines]
                                                 : nullptr);
  const auto join = [&](int64_t filter, Line* parts) {
    const int64_t out = filter / channels * call.filter.problem + filter % channels;
    kernels.join({parts, plan.parts, plan.fold_lines * plan.lanes, taps.data(), plan.taps, plan.period,
                  call.filter.data + out * element, call.TapStep()});
  };
  const int64_t lines = plan.lines + Sums::ListLines(plan);
  ParallelFor(pool, plan.threads, groups * plan.parts, lines, [&](Scratch& scratch, int64_t task) {
    const int64_t part = task % plan.parts, group = task / plan.parts;
    Line* const memory_of_task = scratch.Lines(lines);
    Sums sums(plan, memory_of_task);
    const int64_t end = std::min((group + 1) * plan.group, plan.filters);
    for (int64_t filter = group * plan.group, slots; filter < end; filter += slots) {
      slots = std::min(plan.slots, end - filter);
      Line* const totals = has_parts ? memory.get() + (filter * plan.parts + part) * plan.fold_lines
                                     : memory_of_task + plan.lines - slots * plan.fold_lines;
      sums.Begin(totals, slots);
      const int64_t last = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = part * plan.units / plan.parts; unit < last; ++unit) {
        sums.BeginUnit(unit / plan.tiles % plan.bands, unit % plan.tiles);
        for (int64_t slot = 0; slot < slots; ++slot) {
          const bool is_next = slot + 1 < slots;
          // Bands and tiles of one image are read in the order of memory.
          const bool is_last = !is_next && (plan.bands * plan.tiles > 1 || unit + 1 == last);
          const int64_t next_filter = is_next ? filter + slot + 1 : filter;
          const int64_t next_unit = is_next || is_last ? unit : unit + 1;
          const Unit place = plan.At(filter + slot, unit);
          sums.Add(slot, place, is_last ? place : plan.At(next_filter, next_unit));
        }
      }
      sums.Fold();
      for (int64_t slot = 0; slot < slots && !has_parts; ++slot) {
        join(filter + slot, totals + slot * plan.fold_lines);
      }
    }
  });
  for (int64_t filter = 0; filter < plan.filters && has_parts; ++filter) {
    join(filter, memory.get() + filter * plan.parts * plan.fold_lines);
  }
}

}  // namespace jax_dwbp
