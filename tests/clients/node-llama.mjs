// node-llama-cpp: the greedy continuation of a prompt. node node-llama.mjs PROMPT MODEL [ADAPTER]
import { getLlama, LlamaCompletion } from "node-llama-cpp";

const [prompt, modelPath, adapter] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 512, threads: 1, ...(adapter ? { lora: adapter } : {}) });
const completion = new LlamaCompletion({ contextSequence: context.getSequence() });
const text = await completion.generateCompletion(model.tokenize(prompt, true), { maxTokens: 16, temperature: 0 });
console.log(JSON.stringify({ text, name: model.fileInfo.metadata.general.name, fileType: model.fileInfo.metadata.general.file_type }));
process.exit(0);
