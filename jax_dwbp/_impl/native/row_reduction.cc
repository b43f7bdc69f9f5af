// The filter gradient by rows. A filter's sum is taken of units, parts of an image that stay in the
// cache.

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
  int64_t in_lines, dy_lines, fold_lines, lines;

  SumPlan(const RowCall& call, int64_t pool_threads)
      : call(call),
        period(call.Period()),
        lanes(call.kernels.lanes),
        line_step(call.LineStep()),
        variants(call.Variants()),
        taps(call.rows.kernel * call.columns.kernel),
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
    units = call.sizes.batch * bands * tiles;
    fold_lines = CeilDiv(taps * period, lanes);
    const int64_t most = kPartBytes / static_cast<int64_t>(sizeof(Line)) / (filters * fold_lines);
    parts = std::max<int64_t>(1, std::min({CeilDiv(kParts, filters), most, units}));
    const int64_t work = filters * units * band * CeilDiv(tile * period, lanes) * taps;
    threads = work < kSmall ? 1 : std::max<int64_t>(pool_threads, 1);  // a host may have no pool
    group = parts > 1 ? 1 : CeilDiv(filters, kTasks * threads);
    // With what the last line reads behind its row.
    in_lines = rows.Packed(band) * in_step / lanes + 1;
    dy_lines = band * dy_step / lanes + 1;
    lines = in_lines + dy_lines + 2 * variants * taps + fold_lines;
  }
};

// What a task sums. What is done for a unit is listed once for all that lie alike in their image: of
// small planes it would take longer to list than to do.
class Sums {
 public:
  Sums(const SumPlan& plan, Line* memory)
      : plan_(plan), in_(memory), dy_(in_ + plan.in_lines), lines_{dy_ + plan.dy_lines, nullptr} {
    lines_[1] = lines_[0] + plan.variants * plan.taps;
    Clear();
    const RowCall& call = plan.call;
    copies_.reserve(1 + call.rows.regions.Size() * call.columns.regions.Size());
    correlations_.reserve(2 * plan.variants * call.rows.taps.Size() * call.columns.taps.Size());
  }

  // What comes next is added to that.
  void Begin(Line* total) {
    total_ = total;
    std::memset(total, 0, plan_.fold_lines * sizeof(Line));
  }

  // Adds what is in some rows and columns of an image, after which come those of the next one or
  // others.
  void Add(const char* x_plane, const char* dy_plane, int64_t band, int64_t tile, bool is_last) {
    if (band != band_ || tile != tile_) List(band, tile);
    if (summed_ + lines_of_unit_ > kFoldLines) Fold();
    summed_ += lines_of_unit_;
    const bool is_whole = plan_.bands * plan_.tiles == 1;
    for (Copy& copy : copies_) {
      copy.rows.from = (copy.is_dy ? dy_plane : x_plane) + copy.from;
      // The planes of a filter lie images apart, which no processor foresees.
      const int64_t image = (copy.is_dy ? plan_.call.out : plan_.call.in).image;
      copy.rows.ahead = is_whole && !is_last ? image * plan_.call.kernels.element_size : 0;
      plan_.call.kernels.row_moves->copy(copy.rows);
      // The zeros around it are there now.
      copy.rows.before = copy.rows.after = 0;
    }
    for (const RowCorrelation& corr : correlations_) plan_.call.kernels.row_sums->correlate(corr);
  }

  // Adds to the total what is in lines.
  void Fold() {
    if (summed_ == 0) return;
    for (int64_t variant = 0; variant < plan_.variants; ++variant) {
      const int64_t counts[] = {WholeLines(variant) > 0 ? LineValues() : 0, Rest(variant)};
      for (int i = 0; i < 2; ++i) {
        if (counts[i] == 0) continue;
        plan_.call.kernels.row_sums->fold({lines_[i] + variant * plan_.taps, plan_.taps, plan_.period,
                                           variant * plan_.lanes % plan_.period, counts[i], total_});
      }
    }
    Clear();
  }

 private:
  struct Copy {
    RowCopy rows;
    int64_t from;  // bytes from the plane's first element
    bool is_dy;
  };

  void Clear() {
    std::memset(lines_[0], 0, 2 * plan_.variants * plan_.taps * sizeof(Line));
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
    copies_.clear();
    correlations_.clear();
    const RowWindow window{.row = row,
                           .row_step = 1,
                           .rows = rows,
                           .phase = 0,
                           .column_step = 1,
                           .column = column,
                           .columns = columns,
                           .size = call.columns.out};
    ListCopy(window, {plan_.period, 1, 1, call.out.column}, call.out, dy_, 0, plan_.dy_step, true);
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
        ListCopy(read, call.InPixels(), call.in, in_, first, plan_.in_step, false);
        const int64_t line = call.rows.Before(i) * call.columns.kernel + call.columns.Before(j);
        for (int64_t variant = 0; variant < plan_.variants; ++variant) {
          const int64_t begin = variant * plan_.lanes, whole = WholeLines(variant);
          const int64_t firsts[] = {begin, begin + whole * plan_.line_step};
          const int64_t counts[] = {whole, Rest(variant) > 0};
          for (int k = 0; k < 2; ++k) {
            if (counts[k] == 0) continue;
            correlations_.push_back({.in = in_,
                                     .first = first + firsts[k],
                                     .in_step = plan_.in_step,
                                     .in_rows = in_end - in_row,
                                     .dy = dy_,
                                     .dy_first = firsts[k],
                                     .dy_step = plan_.dy_step,
                                     .dy_rows = rows,
                                     .offset = row + region.first - in_row,
                                     .row_dilation = call.rows.dilation,
                                     .kernel_rows = call.rows.taps[i].count,
                                     .kernel_columns = call.columns.taps[j].count,
                                     .tap_step = call.columns.dilation * plan_.period,
                                     .lines = counts[k],
                                     .line_step = plan_.line_step,
                                     .sums = lines_[k] + variant * plan_.taps + line,
                                     .sum_step = call.columns.kernel});
          }
        }
      }
    }
  }

  void ListCopy(const RowWindow& window, const RowPixels& pixels, const Tensor& tensor, Line* to,
                int64_t first, int64_t to_step, bool is_dy) {
    copies_.push_back({CopyOf(window, pixels, tensor.row, to, first, to_step),
                       window.First(tensor) * plan_.call.kernels.element_size, is_dy});
  }

  const SumPlan& plan_;
  Line *const in_, *const dy_;
  Line* lines_[2];  // of whole lines, and of the one at the end of each row, which may be less
  Line* total_ = nullptr;
  int64_t band_ = -1, tile_ = -1;  // what is listed
  int64_t values_ = 0;             // of a row
  int64_t lines_of_unit_ = 0, summed_ = 0;
  std::vector<Copy> copies_;
  std::vector<RowCorrelation> correlations_;
};

}  // namespace

void CorrelateRows(ffi::ThreadPool& pool, const RowCall& call) {
  const SumPlan plan(call, pool.num_threads());
  const RowSums& kernels = *call.kernels.row_sums;
  const int64_t element = call.kernels.element_size, channels = call.Planes();
  const int64_t groups = CeilDiv(plan.filters, plan.group);
  const bool has_parts = plan.parts > 1;
  const std::vector<int64_t> taps = call.Taps();
  const std::unique_ptr<Line[]> memory(has_parts ? new Line[plan.filters * plan.parts * plan.fold_lines]
                                                 : nullptr);
  const auto join = [&](int64_t filter, Line* parts) {
    const int64_t out = filter / channels * call.filter.problem + filter % channels;
    kernels.join({parts, plan.parts, plan.fold_lines * plan.lanes, taps.data(), plan.taps, plan.period,
                  call.filter.data + out * element, call.TapStep()});
  };
  ParallelFor(pool, plan.threads, groups * plan.parts, plan.lines, [&](Scratch& scratch, int64_t task) {
    const int64_t part = task % plan.parts, group = task / plan.parts;
    Line* const lines = scratch.Lines(plan.lines);
    Sums sums(plan, lines);
    const int64_t end = std::min((group + 1) * plan.group, plan.filters);
    for (int64_t filter = group * plan.group; filter < end; ++filter) {
      Line* const total = has_parts ? memory.get() + (filter * plan.parts + part) * plan.fold_lines
                                    : lines + plan.lines - plan.fold_lines;
      sums.Begin(total);
      const int64_t problem = filter / channels, channel = filter % channels;
      const int64_t last = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = part * plan.units / plan.parts; unit < last; ++unit) {
        const int64_t tile = unit % plan.tiles, band = unit / plan.tiles % plan.bands;
        const int64_t image = problem * call.sizes.batch + unit / plan.tiles / plan.bands;
        sums.Add(call.in.data + (image * call.in.image + call.InPlane(channel)) * element,
                 call.out.data + (image * call.out.image + call.OutPlane(channel)) * element, band,
                 tile, unit + 1 == last);
      }
      sums.Fold();
      if (!has_parts) join(filter, total);
    }
  });
  for (int64_t filter = 0; filter < plan.filters && has_parts; ++filter) {
    join(filter, memory.get() + filter * plan.parts * plan.fold_lines);
  }
}

}  // namespace jax_dwbp
