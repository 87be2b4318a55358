"""What a report says around its numbers."""

VERDICTS = """\
Each sentence repeats paired differences of the test loss from the tables below: mean, 95 % interval, seeds. Below
zero is better. A method counts as better or worse only where the whole interval lies on one side of zero."""

READING = """\
Each method trains the same model on the same data in the same order, once per seed, with the learning rate that was
best for it in a sweep. So the difference between two methods is taken seed by seed, and what a seed does to both
drops out."""

COMPARISONS = """\
This report makes {count} such comparisons, {tests} of them of the test loss. Each interval stands by itself: none
is corrected for their number. If no methods differed at all, about {chance:.1f} of the {count} would still be
expected to lie on one side of zero."""

TERMS = (
    ("low rank", "A layer whose matrix is the product of two thin ones, B A, of rank r: fewer parameters, less work."),
    ("DLR", "A fixed residual without parameters, added to each low-rank layer while it trains (arXiv 2606.28932)."),
    ("fold", "After training the residual is added to B once and for all: what is deployed is plain low rank."),
    ("seed", "The number from which the weights at the start and the order of the data are drawn."),
    ("sweep", "Runs with seeds of their own that try learning rates; the best one is used in the final runs."),
    ("final run", "A run that is compared. Each method has one for each seed."),
    (
        "movement",
        "How far training can move a weight, in units of what the residual adds to it at the start: the sum of the "
        "run's learning rates over c = alpha / sqrt(ceil(d / r)); of a method without DLR, over that of alpha 1. Near "
        "1 a start is nearly frozen.",
    ),
    ("loss", "Mean of -log(probability of the next token), in nats. Lower is better. Perplexity is exp(loss)."),
    ("validation, test", "Held-out text that chose the learning rate, and other held-out text that chose nothing."),
    ("paired difference", "The mean over seeds of one method's loss less the other's with the same seed."),
    (
        "95 % interval",
        "Mean \N{PLUS-MINUS SIGN} t s / sqrt(n) by Student's t over n seeds with standard deviation s: 95 % of such "
        "intervals hold the true mean. It speaks of other seeds, not of other corpora, sizes or settings, and takes "
        "the chosen learning rate as given.",
    ),
)

QUALITY = """\
Loss at the end of the final runs, mean over seeds. Methods are compared on the test text, which chose nothing. With
one seed there is no interval."""

REFERENCE = """\
{names}: of another group, shown because methods of this one are compared with it."""

DIFFERENCES = """\
Differences of the test loss, paired by seed. Below zero the first method is better. "No difference shown" means
that the interval holds zero, not that there is none."""

COST = """\
Parameters, FLOPs and memory are computed from shapes: "in the blocks" are those of attention and MLP layers, the others
stand in embedding, head and norms; FLOPs of the forward and backward pass, memory of one device
while it trains. Tokens per second are the median over the final runs, timed on a machine that may have been shared
with other work: read them as rough."""

FRONTIER = """\
Quality against parameters: {names}. For these no other method of the table has at most as many parameters and a
lower mean test loss. They are means; whether methods differ is said by the paired differences."""

BUDGETS = """\
Validation loss where every method has spent the same: the smallest budget that all of them reached, read off each
run's curve on the straight line between two evaluations. Where that is less than the whole run, the learning rate
had not come down yet, which makes the run look worse than one that was planned for this budget. A method that was
trained for the FLOPs of another is the fair comparison; the table names it."""

RATES = """\
For each method the rate with the lowest mean validation loss over the sweep's seeds is chosen, and none with a
failed run. Where the best rate was the smallest or largest, more were tried beyond it, as many as the study allows."""

DRIFT = """\
The fold adds the residual to the weights and rounds the sum once. In float32 that is a relative error of at most
6e-8 of each weight, and the model should say the same as before."""

SPECTRA = """\
How many directions a layer's whole matrix uses. The effective rank is exp of the entropy of the singular values
over their sum (Roy and Vetterli 2007): their number where all are equal, 1 where only one is not zero. Of a
low-rank layer the matrix is B A, whatever stands between the factors. One run of each method, so there is no
interval."""

SAMPLES = """\
Written by the folded model of each method's first seed, all after the same prompt. One text says little: compare
losses."""

FAILED = """\
Runs that failed count as failed in the tables and are part of no mean."""

MADE = """\
Seeds of the final runs: {seeds}; of the sweep: {sweep_seeds}. Every number was made from study.yaml and the files
records/NAME.json; the last column of a table names them, in the shell's shorthand. The command foldrank report
makes this page again from them."""
