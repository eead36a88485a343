// A model in ONNX Runtime, on one thread of this device.

import * as ort from "./onnxruntime/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that hosts of static files do not send
ort.env.wasm.wasmPaths = { wasm: new URL("onnxruntime/ort-wasm-simd-threaded.wasm", import.meta.url).href };

const MOST_PASSES = 5;
const MOST_MILLISECONDS = 500; // for which somebody waits to know the time of a pass

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

function median(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export class Classifier {
  /** @param session an ort.InferenceSession. @param classIndex place of the class token before any fusion. */
  constructor(session, classIndex) {
    this.session = session;
    this.classIndex = classIndex;
  }

  static async load(url, classIndex) {
    // A model of another version of the site may be in the browser's cache
    const response = await fetch(url, { cache: "no-cache" }).catch((error) => ({ ok: false, status: error.message }));
    if (!response.ok) {
      throw new Error(`${url}: this file of the page cannot be loaded (${response.status})`);
    }
    const bytes = await response.arrayBuffer();
    try {
      return new Classifier(await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }), classIndex);
    } catch (error) {
      throw new Error(`${url}: ONNX Runtime cannot run this model (${error.message})`);
    }
  }

  async run(values, height, width) {
    const pixel_values = new ort.Tensor("float32", values, [1, 3, height, width]);
    const started = performance.now();
    const { logits, token_maps } = await this.session.run({ pixel_values });
    return { milliseconds: performance.now() - started, logits, token_maps };
  }

  /**
   * Classify one image.
   *
   * @param values float32 (3, height, width).
   * @param isTimed whether to repeat the pass, so that its time is a median.
   * @returns probabilities of all classes; of each layer, the token that carries each patch; milliseconds of a pass.
   */
  async answer(values, height, width, isTimed) {
    const first = await this.run(values, height, width);
    const times = [first.milliseconds];
    const started = performance.now();
    while (isTimed && times.length < MOST_PASSES + 1 && performance.now() - started < MOST_MILLISECONDS) {
      times.push((await this.run(values, height, width)).milliseconds);
    }
    const [, layers, length] = first.token_maps.dims;
    const map = Array.from(first.token_maps.data, Number);
    const tokens = Array.from({ length: layers }, (_, layer) =>
      map.slice(layer * length, (layer + 1) * length).toSpliced(this.classIndex, 1),
    );
    // The first pass of a model is slower than those that follow
    const milliseconds = median(times.length > 1 ? times.slice(1) : times);
    return { probabilities: softmax(Array.from(first.logits.data)), tokens, milliseconds };
  }
}
