"""Turn images into code indices and back, with the bits per pixel that they take.

    python export_codes.py encode --checkpoint experiments/RUN/final_model.pt --output test_codes.npz
    python export_codes.py encode --checkpoint experiments/RUN/final_model.pt --split train --output train_codes.npz
    python export_codes.py encode --checkpoint experiments/RUN/final_model.pt --refine 2 --output better_codes.npz
    python export_codes.py decode --checkpoint experiments/RUN/final_model.pt --input test_codes.npz --output images.npz

The .npz of encode holds `indices` (N, H, W), of the smallest unsigned type that holds K - 1, `codebook_size`, and
`model`, the sha256 of the weights, which decode checks; that of decode holds `images` (N, S, S, 3) uint8.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path

import train  # before PyTorch: says how its threads wait

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import vqvae


@torch.no_grad()
def encode(model, images, refine=0):
    """Images uint8 (N, S, S, 3) -> code indices int64 (N, S/f, S/f) on the CPU; refine: passes of VQVAE.refined."""
    device = next(model.parameters()).device
    batches = tqdm(images.split(vqvae.evaluation_batch(images.shape[1], device)), desc="encoding", disable=None)
    with vqvae.eval_mode(model):
        return torch.cat([model.encode(vqvae.to_float(batch.to(device)), refine).cpu() for batch in batches])


@torch.no_grad()
def decode(model, indices):
    """Code indices int64 (N, H, W) -> images uint8 (N, S, S, 3) on the CPU."""
    device = next(model.parameters()).device
    side = indices.shape[1] * model.downsample
    batches = tqdm(indices.split(vqvae.evaluation_batch(side, device)), desc="decoding", disable=None)
    with vqvae.eval_mode(model):
        return torch.cat([vqvae.to_bytes(model.decode(batch.to(device))).permute(0, 2, 3, 1).cpu() for batch in batches])


def bits_per_pixel(model, indices, codebook_size, pixels):
    """{'fixed_length', 'entropy'} in bits per pixel for indices (N, H, W) of images of `pixels` pixels, from `model`.

    fixed_length: ceil(log2 K) bits per index; entropy: what an ideal coder needs that knows
    of the other indices only what `vqvae.codebook_metrics` says.
    """
    per_image = indices[0].numel()
    histogram = vqvae.empty_histogram(model, codebook_size)
    vqvae.count_codes(histogram, model, indices.to(histogram.device))
    entropy = vqvae.codebook_metrics(histogram, codebook_size)["bits_per_index"]
    return {"fixed_length": math.ceil(math.log2(codebook_size)) * per_image / pixels, "entropy": entropy * per_image / pixels}


def weights_digest(model):
    """Tells the models apart whose codes are not each other's."""
    return vqvae.digest(value for _, value in sorted(model.state_dict().items()))


def save_npz(path, **arrays):
    vqvae.atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def encode_command(options, model, config):
    if options.data_dir is not None:
        config = dataclasses.replace(config, data_dir=options.data_dir)
    if options.split == "test":
        images = vqvae.test_images(config)
    else:
        images = vqvae.training_images(config)[0 if options.split == "train" else 1]
    if not len(images):
        raise vqvae.UserError(f"split: the {options.split} split of this run is empty")
    indices = encode(model, images, refine=options.refine)
    kind = np.min_scalar_type(config.codebook_size - 1)
    save_npz(options.output, indices=indices.numpy().astype(kind), codebook_size=config.codebook_size,
             model=weights_digest(model))
    pixels = images.shape[1] * images.shape[2]
    bits = bits_per_pixel(model, indices, config.codebook_size, pixels)
    on_disk = Path(options.output).stat().st_size * 8 / (len(images) * pixels)
    print(f"{options.output}: {len(images)} images of {images.shape[1]}x{images.shape[2]} as "
          f"{indices.shape[1]}x{indices.shape[2]} codes; bits per pixel: {bits['fixed_length']:.4f} at fixed length, "
          f"{bits['entropy']:.4f} entropy, {on_disk:.4f} as this file")


def decode_command(options, model, config):
    try:
        with np.load(options.input, allow_pickle=False) as stored:
            indices, size = stored["indices"], int(stored["codebook_size"])
            weights = str(stored["model"]) if "model" in stored else None  # none in earlier versions
    except Exception as error:  # NumPy and zipfile raise many types on damaged or foreign files; all mean the same here
        raise vqvae.UserError(f"{options.input}: not a file of `export_codes.py encode` ({error})") from error
    if size != config.codebook_size:
        raise vqvae.UserError(f"{options.input}: codes of a codebook of {size}, the checkpoint has {config.codebook_size}; "
                              "give the one that made them")
    if weights not in (None, weights_digest(model)):
        raise vqvae.UserError(f"{options.input}: codes of another model than {options.checkpoint}; give the one that made them")
    side = config.image_size // config.downsample
    if indices.shape[1:] != (side, side) or not indices.size or indices.dtype.kind != "u" or indices.max() >= size:
        raise vqvae.UserError(f"{options.input}: indices must be unsigned (N, {side}, {side}) below {size}, not empty")
    images = decode(model, torch.from_numpy(indices.astype(np.int64)))
    save_npz(options.output, images=images.numpy())
    print(f"{options.output}: {len(images)} images of {images.shape[1]}x{images.shape[2]}")


def parse(argv):
    parser = train.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=train.Parser)
    for name, function, text in (("encode", encode_command, "images to indices"),
                                 ("decode", decode_command, "indices to images")):
        command = commands.add_parser(name, help=text)
        command.set_defaults(function=function)
        command.add_argument("--checkpoint", required=True, metavar="FILE", help="run folder, final_model.pt or a checkpoint")
        command.add_argument("--output", required=True, metavar="FILE.npz", help="where to write")
        command.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, mps, cuda or cuda:N")
        if name == "encode":
            command.add_argument("--split", default="test", choices=("train", "val", "test"), help="default test")
            command.add_argument("--refine", type=train.whole(0), default=0, metavar="N",
                                 help="passes through the decoder that improve the codes (default 0)")
            command.add_argument("--data_dir", metavar="DIR", help="where the data set is (default: as in training)")
        else:
            command.add_argument("--input", required=True, metavar="FILE.npz", help="a file of `encode`")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    checkpoint = Path(options.checkpoint)
    read = {checkpoint, checkpoint / "final_model.pt", *([Path(options.input)] if options.command == "decode" else [])}
    if os.path.realpath(options.output) in map(os.path.realpath, read):  # Path.resolve raises RuntimeError for a circle of links
        raise vqvae.UserError(f"output: {options.output} is read, too, and would be lost; choose another file")
    vqvae.check_writable(options.output)
    device, _ = vqvae.pick_device(options.device)
    model, config = vqvae.load_model(checkpoint, device)
    options.function(options, model, config)


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
