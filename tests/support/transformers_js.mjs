// Classify an image by transformers.js: node transformers_js.mjs PACKAGE_FOLDER MODELS_FOLDER MODEL IMAGE
// Prints what the pipeline answers, with the scores of all classes, and the logits of the model, as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [packages, models, model, image] = process.argv.slice(2);
const entry = createRequire(`${packages}/`).resolve("@huggingface/transformers");
const { AutoConfig, env, load_image, pipeline } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = models;

const config = await AutoConfig.from_pretrained(model);
config.model_type = "vit";
const classify = await pipeline("image-classification", model, { config, dtype: "fp32" });
const answers = await classify(image, { top_k: Object.keys(config.id2label).length });
const inputs = await classify.processor([await load_image(image)]);
const { logits } = await classify.model(inputs);
console.log(JSON.stringify({ answers, logits: Array.from(logits.data) }));
