// Timers, a worker thread and a file. usage: counter.js DIR
const fs = require('fs');
const { Worker, isMainThread, parentPort } = require('worker_threads');

if (!isMainThread) {
  parentPort.on('message', (n) => parentPort.postMessage(n + 1));
} else {
  const dir = process.argv[2];
  const say = (name, text) => {
    fs.writeFileSync(`${dir}/.${name}`, text);
    fs.renameSync(`${dir}/.${name}`, `${dir}/${name}`);
  };
  const journal = fs.openSync(`${dir}/work/journal`, 'w+');
  const worker = new Worker(__filename);
  let [n, verdict] = [0, 'PASS'];
  worker.on('message', (answer) => {
    if (answer !== n + 1) verdict = `FAIL: the worker answered ${answer} to ${n}`;
    fs.writeSync(journal, `${n}\n`);
    n = answer;
    if (n === 10) say('ready', String(process.pid));
    if (!fs.existsSync(`${dir}/check-request`)) {
      setTimeout(() => worker.postMessage(n), 3);
      return;
    }
    const want = Array.from({ length: n }, (_, i) => `${i}\n`).join('');
    if (fs.readFileSync(`${dir}/work/journal`, 'utf8') !== want) verdict = 'FAIL: the file has lost or doubled lines';
    say('result', verdict);
    process.exit(0);
  });
  worker.postMessage(n);
}
