"""What the numbers of a report mean: one definition a term, shown on hovering and listed at the end of the page."""

TERMS = {
    "site": "A conv or dense layer behind which a BatchNorm was put, by its name in the original network.",
    "channels": "Output channels or features of the layer, C: as many means and deviations were measured.",
    "|μ|": "Median over the channels of |μ|, μ being a channel's mean over all calibration images and positions, "
    "until training changes it; in activation units.",
    "σ": "Median over the channels of σ, a channel's (population) standard deviation over all calibration images and "
    "positions, until training changes it; in activation units.",
    "dead": "Channels whose variance σ² is below the BatchNorm's eps: constant, or nearly, on the images that it was "
    "measured on. Training with BatchNorm can amplify the little they say.",
    "near eps": "Channels with eps ≤ σ² < 10·eps: eps makes up more than a tenth of what they are divided by, so they "
    "come out with a variance clearly below 1.",
    "silent": "Channels that a ReLU follows and that were never above 0 on the images of the histograms: they say "
    "nothing further on. A dash: no ReLU follows.",
    "pre-activation": "What a conv or dense layer puts out, before its activation: the BatchNorm's input x, unless it "
    "was placed behind the activation.",
    "normalized": "(x − μ)/√(σ² + eps), channel by channel: what the BatchNorm makes of a pre-activation x before its "
    "own weight and bias. The dotted line is the normal distribution.",
    "bit-identical": "In eval mode every output has the same bits (torch.equal) on every image.",
    "largest difference": "Largest |candidate − reference| over all outputs of all images; relative: divided by the "
    "largest |reference|.",
    "top-1 agreement": "Share of the images for which both networks put the same class first.",
    "drift": "‖train − eval‖₂ / ‖eval‖₂ over the outputs: how far they move when the BatchNorms are in train mode and "
    "(in statistics mode batch) normalize by the batch instead of by the population.",
    "batch": "set_statistics_(model, 'batch'): ordinary BatchNorm, normalizing by the batch.",
    "renorm": "set_statistics_(model, 'renorm'): Batch Renormalization (Ioffe 2017); the first step is the pretrained "
    "function, the last plain BatchNorm.",
    "running": "set_statistics_(model, 'running'): frozen statistics, trainable weight and bias.",
    "images a batch": "What train mode normalizes by at a time, on one device or, with a process group, on all.",
    "placement": "Whether BatchNorm stands before the activation, as in the BN paper, or behind it; and which layers "
    "were asked for.",
    "eps, momentum": "Of the BatchNorms: eps is added to the variance; the momentum is that of the running statistics.",
    "before": "The network without BatchNorm.",
    "after": "The network with BatchNorm.",
    "after ÷ before": "1: the same; 1.5: half as much again.",
    "parameters": "Numbers that training changes: those that take a gradient.",
    "training step": "Forward and backward pass of the whole network in train mode, without an optimizer: the "
    "fastest of at least three, the two networks taking turns. On a busy machine no more than a hint.",
    "kept for backward": "Bytes of the activations and statistics that autograd keeps from the forward pass until the "
    "backward pass, parameters not counted: what decides on the batch size that fits.",
    "accuracy": "Share of the validation images that are classified right.",
    "spread": "Largest minus smallest accuracy over the seeds.",
    "at rate": "The learning rate with the highest accuracy at the end: the one at which the arm is judged.",
    "trains to": "Largest learning rate that diverged with no seed and ends within 10 points of the arm's accuracy.",
    "to plain's": "Training steps until the accuracy first reached what plain's best rate ends with.",
    "steps": "Training steps of a run: batches that the optimizer saw.",
    "step": "Training steps done so far.",
    "epoch": "Passes over the training images done so far.",
    "learning rate": "Of the last step.",
    "peak learning rate": "The largest of the schedule, which rises to it and falls to 0 from there.",
    "training loss": "Cross entropy in nats, mean over the images of the steps since the last validation.",
    "training accuracy": "Share of these images that were classified right, augmented as they are.",
    "validation loss": "Cross entropy in nats, mean over the validation images.",
    "validation accuracy": "Share of the validation images that are classified right.",
    "statistics": "What the BatchNorms normalized by in training: a mode of set_statistics_.",
    "seconds": "Time of training and validating, setting up left out, mean over those that did not diverge. Runs that "
    "shared the machine slow each other down alike.",
    "plain": "The network as it is, without BatchNorm.",
    "bn": "BatchNorm inserted so that the network computes what it did.",
    "bn-naive": "BatchNorm inserted with weight 1 and bias 0, as a new one has: it forgets what the network computed.",
    "bn-half": "bn with half the epochs.",
    "loss": "Cross entropy, mean over the images, in nats; training: over the steps since the last validation.",
    "images/s": "Images a second in training, over all processes.",
}
