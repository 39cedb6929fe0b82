"""Accuracy and loss with controls; targets in the base's own words.

run.py         the story of an evaluation
conditions.py  what stands for the thoughts
strategies.py  how an answer is reached
tree.py        of answers begun in several ways the best are gone on with
graph.py       whole answers written, scored, chosen from, merged and improved
judging.py     what these two share: drafts, rounds, the base's judgements of them
jobs.py        work over the ranks, kept on disk batch by batch
decoder.py     what is decoded
losses.py      the losses of texts: of the reference solutions
forgetting.py  what a method that changes the base has it forget
nearest.py     the tokens that thoughts are nearest to
options.py     answers read from the probabilities of the options
spent.py       what answers cost: tokens and seconds
votes.py       several samples of a problem: majority and pass@k
targets.py     solutions that the base writes to be trained on
report.py      from what was found to the table, and which report is the run's
grid.py        one report of several evaluations: over seeds, by number of thoughts
study.py       the report of a study: every cell, over the seeds, paired tests
words.py       the same in words, and as a table
study_page.py  the same as one page
plots.py       the page's plots
report_page.py an evaluation's report as one page, with what the base wrote to each problem
board.py       an evaluation's numbers in TensorBoard
document.py    what the pages have in common
drawing.py     what their plots have in common
statistics.py  intervals and paired tests
"""
