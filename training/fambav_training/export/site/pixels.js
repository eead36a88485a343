// From an image to the numbers that the model takes, as Pillow and the model's image processor make them.

// Weights are whole multiples of 1 / UNIT, so that ties are rounded as Pillow rounds them.
const UNIT = 2 ** 22;

const KERNELS = {
  bilinear: { reach: 1, at: (x) => Math.max(0, 1 - x) },
  bicubic: {
    reach: 2,
    at: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0),
  },
};

/** For every target pixel, the first source pixel that it sees and the weights, by 1 / UNIT, of those that it sees. */
function resamplingWeights(source, target, kernel) {
  const scale = source / target;
  const stretch = Math.max(scale, 1); // a smaller image averages all that its pixels cover
  return Array.from({ length: target }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - kernel.reach * stretch + 0.5));
    const end = Math.min(source, Math.trunc(center + kernel.reach * stretch + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) =>
      kernel.at(Math.abs((first + i - center + 0.5) / stretch)),
    );
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: weights.map((weight) => Math.round((weight / total) * UNIT)) };
  });
}

/** Resample the rows of (height, width, 4) bytes and transpose: (newWidth, height, 4). */
function resampleAndTranspose(pixels, height, width, newWidth, kernel) {
  const result = new Uint8ClampedArray(newWidth * height * 4); // bytes between two passes, as in Pillow
  resamplingWeights(width, newWidth, kernel).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let channel = 0; channel < 4; channel++) {
        let sum = 0;
        let place = 4 * (y * width + first) + channel;
        for (const weight of weights) {
          sum += weight * pixels[place];
          place += 4;
        }
        result[4 * (x * height + y) + channel] = Math.floor(sum / UNIT + 0.5);
      }
    }
  });
  return result;
}

/** Resize an ImageData as Pillow does: (height, width, 4) bytes. */
export function resize(image, height, width, resample) {
  const kernel = KERNELS[resample];
  const columns = resampleAndTranspose(image.data, image.height, image.width, width, kernel);
  return resampleAndTranspose(columns, width, image.height, height, kernel);
}

/** (height, width, 4) bytes to normalised float32 (3, height, width). */
export function normalize(pixels, { rescale_factor, image_mean, image_std }) {
  const size = pixels.length / 4;
  const values = new Float32Array(3 * size);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < size; i++) {
      values[channel * size + i] = (pixels[4 * i + channel] * rescale_factor - image_mean[channel]) / image_std[channel];
    }
  }
  return values;
}

/** An ImageData of anything that a canvas can draw; what is transparent becomes white. */
export function readPixels(source, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}
