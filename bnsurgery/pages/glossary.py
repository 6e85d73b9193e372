"""Definitions of a report's terms, shown on hovering and listed at the end of the page."""

TERMS = {
    "site": "A conv or dense layer with an inserted BatchNorm behind it, by its name in the original network.",
    "channels": "Output channels or features of the layer, C. Each has a mean and a deviation.",
    "|μ|": "Median of the channels' |μ|, in activation units: measured in calibration, over images and positions.",
    "σ": "Median of the channels' σ (of the population), in activation units, measured as μ. Training changes both.",
    "dead": "Channels whose variance σ² is below the BatchNorm's eps: nearly constant on the calibration images. "
    "Training with BatchNorm can amplify their small differences.",
    "near eps": "Channels with eps ≤ σ² < 10·eps. Their output has a variance clearly below 1, since eps is more than "
    "a tenth of σ².",
    "silent": "Channels that a ReLU follows and that were never above 0 on the images of the histograms, so that the "
    "ReLU outputs 0 there. A dash: no ReLU follows.",
    "pre-activation": "Output of a conv or dense layer before its activation: the BatchNorm's input x, unless it "
    "was placed behind the activation.",
    "normalized": "(x − μ)/√(σ² + eps), channel by channel: a pre-activation x behind the BatchNorm, before its weight "
    "and bias. The dotted line is the normal distribution.",
    "bit-identical": "In eval mode every output has the same bits (torch.equal) on every image.",
    "largest difference": "Largest |candidate − reference|, over all outputs; relative: ÷ the largest |reference|.",
    "top-1 agreement": "Share of the images for which both networks rank the same class first.",
    "drift": "‖train − eval‖₂ / ‖eval‖₂ over the outputs: how far they move when the BatchNorms are in train mode and "
    "(in statistics mode batch) normalize by the batch instead of by the population.",
    "batch": "set_statistics_(model, 'batch'): ordinary BatchNorm, which normalizes by the batch.",
    "renorm": "set_statistics_(model, 'renorm'): Batch Renormalization (Ioffe 2017). The first step is the pretrained "
    "function, the last plain BatchNorm.",
    "running": "set_statistics_(model, 'running'): frozen statistics, trainable weight and bias.",
    "images a batch": "Images that train mode normalizes together, on one device or over a process group.",
    "placement": "Whether BatchNorm stands before the activation (as in the BN paper) or after it; and the layers.",
    "eps, momentum": "eps is added to the variance; momentum is the share of a new batch in the running statistics.",
    "before": "The network without BatchNorm.",
    "after": "The network with BatchNorm.",
    "after ÷ before": "1: the same; 1.5: half as much again.",
    "parameters": "Trainable numbers: those that take a gradient.",
    "training step": "Time of a forward and backward pass of the whole network in train mode, without an optimizer: "
    "the fastest of at least three, the two networks by turns. On a busy machine a rough estimate.",
    "kept for backward": "Bytes of the activations and statistics that autograd keeps from the forward to the backward "
    "pass, without parameters. They decide which batch size fits.",
    "accuracy": "Share of the validation images that are classified right; in a comparison of the test images, if the "
    "data has a test part.",
    "at start": "Validation accuracy before the first step.",
    "judged on": "The part of the data whose accuracies and spreads are shown. The validation part chooses the rates.",
    "task": "Near if a fitted head gains more than 10 points from the pretrained function before training, far if it "
    "gains less, not clear where 10 points are within two standard errors. On a far task a fresh BatchNorm may do as "
    "well or better.",
    "dead at first": "Channels with σ² < eps at the first validation.",
    "dead at the end": "Channels with σ² < eps at the last validation: nearly constant on the training images.",
    "σ at first": "Median of σ over the channels at the first validation, in activation units.",
    "σ at the end": "Median of σ over the channels at the last validation, in activation units. σ is the square root "
    "of the running variance, of the network as it would be kept.",
    "smallest σ": "Smallest σ over the channels at the last validation.",
    "largest σ": "Largest σ over the channels at the last validation.",
    "spread": "Largest minus smallest accuracy over the seeds.",
    "at rate": "The learning rate with the highest accuracy at the end, at which the arm is judged.",
    "trains to": "Largest learning rate that diverges with no seed and ends within 10 points of the arm's accuracy.",
    "to plain's": "Training steps until the accuracy first reaches that of plain's best rate at the end.",
    "steps": "Training steps of a run: batches that the optimizer saw.",
    "step": "Training steps so far.",
    "epoch": "Passes over the training images so far.",
    "learning rate": "Learning rate of the last step.",
    "peak learning rate": "Largest learning rate of the schedule, which rises to it and then falls to 0.",
    "training loss": "Cross entropy in nats, mean over the images of the steps since the last validation.",
    "training accuracy": "Share of these images that were classified right, augmented as they are.",
    "validation loss": "Cross entropy in nats, mean over the validation images.",
    "validation accuracy": "Share of the validation images that are classified right.",
    "statistics": "The BatchNorms' mode in training, see set_statistics_.",
    "seconds": "Time of training and validation without set-up, mean over the runs that did not diverge. Runs that "
    "share a machine slow each other down alike.",
    "plain": "The network as it is, without BatchNorm.",
    "bn": "BatchNorm inserted so that the network's outputs stay the same.",
    "bn-naive": "BatchNorm inserted with weight 1 and bias 0, as a new one has: the pretrained function is lost.",
    "bn-half": "bn with half the epochs.",
    "loss": "Cross entropy in nats, mean over the images; in training over the steps since the last validation.",
    "images/s": "Images a second in training, over all processes.",
}
