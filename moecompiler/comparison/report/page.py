"""The comparison as one HTML page."""

from __future__ import annotations

from moecompiler.comparison.report import layers, logits, ops, routing, summary
from moecompiler.comparison.report.programs import shown
from moecompiler.comparison.result import LEVELS, Result
from moecompiler.pages.figures import significant
from moecompiler.pages.page import render_page


def render(result: Result) -> str:
    """The page. Names and texts in it may be anybody's: all are escaped, and no script runs but the page's own."""
    programs = shown(result)
    replayed = result.routing.replayed if result.routing else None
    replayed_layer, replayed_model = (replayed.layer, replayed.model) if replayed else (None, None)
    bound = layers.bound_of(result.verdict, "layer", "relative error")
    replayed_bound = layers.bound_of(result.verdict, "routing", "replayed, relative error")
    axis = layers.axis_of((result.layer, replayed_layer), (bound, replayed_bound))
    as_chosen = [("as each program chooses", result.model, ("model",))] if result.model else []
    forced = (
        [("reference’s experts forced", replayed_model, ("routing", "replayed", "model"))] if replayed_model else []
    )
    at_replayed = ("routing", "replayed", "layer")
    return render_page(
        __package__,
        {
            "bound": summary.bound,
            "stretch": layers.stretch_title,
            "visible": logits.visible,
            "significant": significant,
        },
        result=result,
        data=result.to_json(),
        levels=LEVELS,
        programs=programs,
        headline=summary.headline(result),
        judged=summary.judged(result),
        tiles=summary.tiles(result, programs),
        columns=summary.columns(result, programs),
        properties=summary.properties(result, programs),
        layer_bound=bound,
        replayed_bound=replayed_bound,
        layer_plots=layers.layer_plots(result.layer, ("layer",), programs, axis, bound) if result.layer else None,
        layer_table=layers.layer_table(result.layer, ("layer",), programs) if result.layer else None,
        steepest=layers.steepest(result.layer, programs) if result.layer else [],
        replayed_plots=(
            layers.layer_plots(replayed_layer, at_replayed, programs, axis, replayed_bound) if replayed_layer else None
        ),
        replayed_table=layers.layer_table(replayed_layer, at_replayed, programs) if replayed_layer else None,
        replayed_rows=logits.replayed_rows([*as_chosen, *forced]) if forced else [],
        histogram_data=logits.histogram(result.model, programs) if result.model and result.model.programs else None,
        kl_plots=logits.kl_plots(result.model, programs) if result.model else [],
        strips=logits.strips(result.model, programs, logits.context_of(result)) if result.model else [],
        kl_legend=logits.kl_legend(),
        continuations=lambda text: list(logits.continuations(text, programs)),
        heats=routing.heats(result.routing, programs) if result.routing else [],
        margins=routing.margin_plot(result.routing, programs) if result.routing else None,
        flips=routing.listed_flips(result.routing, programs) if result.routing else [],
        figures=ops.FIGURES,
        op_table=ops.op_table(result.op, programs) if result.op else None,
        time_bars=ops.time_bars(result.op, programs) if result.op else [],
    )
