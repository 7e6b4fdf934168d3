// What llama.cpp makes of a GGUF file, as JSON: the tokens of texts, the log-probability of every token after the
// first, the likeliest token at every place, and what it writes greedily.
//
//   node llama_cpp.mjs NODE_MODULES MODEL.gguf < request.json
//
// A request is {"texts": [...], "ids": [[...], ...], "prompt": [...], "write": n}; each part may be left out.

import {join, resolve} from "node:path";
import {json} from "node:stream/consumers";
import {pathToFileURL} from "node:url";

const [modules, file] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(join(resolve(modules), "node-llama-cpp", "dist", "index.js")));
const request = await json(process.stdin);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
const longest = Math.max(8, ...(request.ids ?? []).map((ids) => ids.length),
    (request.prompt?.length ?? 0) + (request.write ?? 0) + 1);
const context = await model.createContext({contextSize: longest, batchSize: longest, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
const sequence = context.getSequence();

async function logprobs(ids) {
    await sequence.clearHistory();
    const input = ids.map((token, place) => place + 1 === ids.length ? token : [token, {generateNext: {
        logits: {filter: {tokens: [ids[place + 1]], includeTop: 1}}, totalLogitWeight: true
    }}]);
    const found = await sequence.controlledEvaluate(input);
    return found.slice(0, ids.length - 1).map(({next}, place) => {
        const [best, highest] = next.logits.entries().next().value;
        return {logprob: next.logits.get(ids[place + 1]) - highest - Math.log(next.totalLogitWeight), best};
    });
}

async function written(prompt, count) {
    await sequence.clearHistory();
    const tokens = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === count)
            break;
    }
    return tokens;
}

const answer = {
    tokens: (request.texts ?? []).map((text) => [...model.tokenize(text)]),
    bos: model.tokens.shouldPrependBosToken,
    logprobs: []
};
for (const ids of request.ids ?? [])
    answer.logprobs.push(await logprobs(ids));
if (request.write)
    answer.written = await written(request.prompt, request.write);
console.log(JSON.stringify(answer));
await llama.dispose();
