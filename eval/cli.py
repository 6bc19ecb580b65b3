"""``rdlm eval``: measurements of a checkpoint."""

from __future__ import annotations

import typer

from eval.accuracy_cli import accuracy
from eval.depth_cli import depth
from eval.images.fid_cli import fid
from eval.report.cli import report
from eval.texts.cli import gen_ppl, mauve
from eval.texts.lm_eval_cli import PASS_ON, lm_eval
from eval.windows_cli import ce_by_sigma, convergence, nll

app = typer.Typer(no_args_is_help=True)
app.command(
    epilog="Example: rdlm eval nll --checkpoint runs/demo/model --data data/demo --steps 1,4,16 --plot nll.png"
)(nll)
app.command(
    "ce-by-sigma",
    epilog="Example: rdlm eval ce-by-sigma --checkpoint runs/demo/model --data data/demo --plot ce.png",
)(ce_by_sigma)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)
app.command(
    epilog="Example: rdlm eval depth --checkpoint runs/s3/model --task s3 --lengths 16,24 --plot depth.png"
)(depth)
app.command(
    epilog="Example: rdlm eval convergence --checkpoint runs/demo/model --data data/demo --plot c.png"
)(convergence)
app.command(
    "gen-ppl",
    epilog="Example: rdlm eval gen-ppl --checkpoint runs/demo/model --data data/demo --temperature 0.7,1.0 --plot f.png",
)(gen_ppl)
app.command(
    epilog="Example: rdlm eval mauve --checkpoint runs/demo/model --data data/demo --protocol quick --num-steps 1,4"
)(mauve)
app.command(
    epilog="Example: rdlm eval fid --checkpoint runs/dit_cifar10/model --reference data/cifar10/test/images.npy --steps 10,50"
)(fid)
app.command(
    epilog="Example: rdlm eval accuracy --checkpoint runs/vit_cifar10/model --data data/cifar10 --steps 1,4 --plot a.png"
)(accuracy)
app.command(epilog="Example: rdlm eval report results/*.json --out report")(report)


@app.callback()
def evaluate() -> None:
    """Measure a checkpoint."""
