"""Train a classifier of CIFAR-10 that takes Inception's place in r-FID where Inception's weights are not to be had.

    python benchmarks/classifier.py                      # writes experiments/classifier.pt; 25 minutes on one core
    python eval_cifar.py --checkpoint experiments/compare --inception experiments/classifier.pt

A residual network, trained on the images that autoencoders are trained on, as TorchScript with the interface of clean-fid's
Inception. What eval_cifar.py then calls rfid and ris is by its 512 features and 10 classes: compare such figures with each
other only, by one file of the classifier (eval_metrics.json has its sha256).
"""

import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

import vqvae

BATCH_SIZE = 128
LR, WEIGHT_DECAY = 0.1, 5e-4  # peak, of a one-cycle schedule
SHIFT = 4  # pixels, at most
OUTPUT = Path("experiments", "classifier.pt")


class Classifier(nn.Module):
    """ResNet (He et al. 2016) of eight convolutions: layers -> features (B, 512), output -> logits (B, classes).

    Images (B, 3, S, S) in [-1, 1], of any S: they are seen at 32 x 32.
    """

    def __init__(self, classes=10):
        super().__init__()
        net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Conv2d(3, 64, 3, padding=1, bias=False), net.bn1, net.relu,
                                    net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool, nn.Flatten(1))
        self.output = net.fc

    def forward(self, x):
        return self.output(self.layers(x))


def to_input(images):
    """uint8 (B, S, S, 3) -> (B, 3, S, S) in [-1, 1], as eval_cifar.py does."""
    return (images.permute(0, 3, 1, 2).float() - 128) / 128


def augmented(x):
    """Images (B, 3, S, S), each mirrored or not, all shifted by the same few pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    side = x.shape[2]
    return F.pad(x, [SHIFT] * 4)[:, :, top:top + side, left:left + side]


def fit(images, labels, epochs, seed, dtype):
    """A Classifier trained on images uint8 (N, S, S, 3), N >= BATCH_SIZE, with labels (N,), in eval mode."""
    torch.manual_seed(seed)
    network = Classifier(int(labels.max()) + 1).to(images.device, memory_format=vqvae.memory_format(images.device))
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, epochs=epochs, steps_per_epoch=len(images) // BATCH_SIZE,
                                                   pct_start=0.2)
    for epoch in range(epochs):
        started, losses = time.perf_counter(), []
        order = vqvae.epoch_order(len(images), seed, epoch).to(images.device)
        for batch in tqdm(order.split(BATCH_SIZE)[:len(images) // BATCH_SIZE], desc=f"epoch {epoch + 1}/{epochs}", disable=None,
                          leave=False):
            with torch.autocast(images.device.type, dtype, enabled=dtype == torch.bfloat16):
                logits = network(augmented(to_input(images[batch])))
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}/{epochs}  loss {torch.stack(losses).mean():.3f}  {seconds:.0f} s", flush=True)
    return network.eval()


@torch.no_grad()
def accuracy(network, images, labels):
    """Share of images uint8 (N, S, S, 3) whose label (N,) a network finds."""
    hits = [(network(to_input(batch)).argmax(1) == its).sum() for batch, its in zip(images.split(500), labels.split(500))]
    return (sum(hits) / len(images)).item()


def labels_of(config):
    """Labels (50000,) of CIFAR-10's training set, which is there already."""
    return torch.tensor(torchvision.datasets.CIFAR10(config.data_dir, train=True).targets)


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"where to write it (default {OUTPUT})")
    parser.add_argument("--epochs", type=train.whole(1), default=10, metavar="N", help="over the training set (default 10)")
    parser.add_argument("--seed", type=train.whole(0), default=0, metavar="N", help="of weights and data order (default 0)")
    parser.add_argument("--data_dir", default="data", metavar="DIR",
                        help="where CIFAR-10 is or will be downloaded to (default data)")
    parser.add_argument("--train_subset", type=train.whole(BATCH_SIZE), metavar="N", help="only the first N training images")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, mps, cuda or cuda:N (default auto)")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    config = vqvae.Config(data_dir=options.data_dir, train_subset=options.train_subset, seed=options.seed)
    device, reason = vqvae.pick_device(options.device)
    dtype, _ = vqvae.pick_precision("auto", device)
    if options.output == OUTPUT:
        OUTPUT.parent.mkdir(exist_ok=True)
    vqvae.check_writable(options.output)
    print(f"device: {device} ({reason})")
    train_set, val_set = (images.to(device) for images in vqvae.training_images(config))
    labels = labels_of(config).to(device)
    network = fit(train_set, labels[:len(train_set)], options.epochs, config.seed, dtype)
    print(f"accuracy on {len(val_set)} validation images: {accuracy(network, val_set, labels[-len(val_set):]):.1%}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is called deprecated, but clean-fid's Inception is TorchScript
        vqvae.atomic_write(options.output, lambda file: torch.jit.save(torch.jit.script(network.cpu()), file))
    print(f"written: {options.output}")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
